"""Training: configuration, recipes, step, trainer."""

from jaxsys.train.config import CheckpointConfig, DataConfig, SampleConfig, TrainConfig

__all__ = ["CheckpointConfig", "DataConfig", "SampleConfig", "TrainConfig"]
