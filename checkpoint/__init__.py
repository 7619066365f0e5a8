"""What survives: asynchronous, verified checkpoints of logical arrays that fit any mesh."""

from checkpoint.collect import Collected, collect
from checkpoint.compare import DiffReport, diff
from checkpoint.conversion import Progress, convert
from checkpoint.copying import Copied, copy_steps
from checkpoint.formats.native import CheckpointSource, NativeSink, NativeSource
from checkpoint.inspect import StepInfo, StepReport, list_steps, verify
from checkpoint.levels import Best, Level
from checkpoint.manager import Failure, Manager, Restored, SaveHandle, SaveMetrics
from checkpoint.manifest import CorruptError, Manifest
from checkpoint.places import Place, find_place, root_of
from checkpoint.reader import CheckpointReader, VerifyReport, find_checkpoint, open_checkpoint
from checkpoint.reshard import Origin, load, write
from checkpoint.rules import Rules

__all__ = [
    "Best",
    "CheckpointReader",
    "CheckpointSource",
    "Collected",
    "Copied",
    "CorruptError",
    "DiffReport",
    "Failure",
    "Level",
    "Manager",
    "Manifest",
    "NativeSink",
    "NativeSource",
    "Origin",
    "Place",
    "Progress",
    "Restored",
    "Rules",
    "SaveHandle",
    "SaveMetrics",
    "StepInfo",
    "StepReport",
    "VerifyReport",
    "collect",
    "convert",
    "copy_steps",
    "diff",
    "find_checkpoint",
    "find_place",
    "list_steps",
    "load",
    "open_checkpoint",
    "root_of",
    "verify",
    "write",
]
