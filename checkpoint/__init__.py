"""What survives: asynchronous, verified checkpoints of logical arrays that fit any mesh."""

from checkpoint.conversion import Progress, convert
from checkpoint.formats.native import NativeSink, NativeSource
from checkpoint.levels import Best, Level
from checkpoint.manager import Failure, Manager, Restored, SaveHandle, SaveMetrics
from checkpoint.manifest import CorruptError, Manifest
from checkpoint.reader import CheckpointReader, VerifyReport, find_checkpoint, open_checkpoint
from checkpoint.reshard import Origin, load, write
from checkpoint.rules import Rules

__all__ = [
    "Best",
    "CheckpointReader",
    "CorruptError",
    "Failure",
    "Level",
    "Manager",
    "Manifest",
    "NativeSink",
    "NativeSource",
    "Origin",
    "Progress",
    "Restored",
    "Rules",
    "SaveHandle",
    "SaveMetrics",
    "VerifyReport",
    "convert",
    "find_checkpoint",
    "load",
    "open_checkpoint",
    "write",
]
