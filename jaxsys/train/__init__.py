"""Training: configuration, recipes, step, trainer."""

from jaxsys.train.config import CheckpointConfig, DataConfig, TrainConfig

__all__ = ["CheckpointConfig", "DataConfig", "TrainConfig"]
