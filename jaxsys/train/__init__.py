"""Training: configuration, recipes, step, trainer."""

from jaxsys.train.config import CheckpointConfig, DataConfig, ExpertsConfig, SampleConfig, TrainConfig

__all__ = ["CheckpointConfig", "DataConfig", "ExpertsConfig", "SampleConfig", "TrainConfig"]
