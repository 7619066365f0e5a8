"""What survives: asynchronous, verified checkpoints of logical arrays that fit any mesh."""

from checkpoint.levels import Best, Level
from checkpoint.manager import Failure, Manager, Restored, SaveHandle, SaveMetrics
from checkpoint.manifest import CorruptError, Manifest
from checkpoint.reader import CheckpointReader, VerifyReport, find_checkpoint, open_checkpoint
from checkpoint.reshard import Origin, copy, load, write

__all__ = [
    "Best",
    "CheckpointReader",
    "CorruptError",
    "Failure",
    "Level",
    "Manager",
    "Manifest",
    "Origin",
    "Restored",
    "SaveHandle",
    "SaveMetrics",
    "VerifyReport",
    "copy",
    "find_checkpoint",
    "load",
    "open_checkpoint",
    "write",
]
