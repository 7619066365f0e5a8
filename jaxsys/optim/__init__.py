"""Optimizers and schedules by name."""

from jaxsys.optim.optimizer import SGD, Adafactor, AdamW, OptimConfig, Optimizer
from jaxsys.optim.schedules import WSD, Constant, Cosine

__all__ = ["SGD", "WSD", "Adafactor", "AdamW", "Constant", "Cosine", "OptimConfig", "Optimizer"]
