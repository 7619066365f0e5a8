"""Text to batches: sources, tokenised shards, packing, a loader that is a pure function of (seed, step)."""

from jaxsys.data.balanced import BalancedLoader
from jaxsys.data.loader import Loader, prefetch
from jaxsys.data.packing import NO_TARGET, Batch, pack
from jaxsys.data.shards import Dataset, build_dataset
from jaxsys.data.sources import Document, Documents, documents

__all__ = [
    "NO_TARGET",
    "BalancedLoader",
    "Batch",
    "Dataset",
    "Document",
    "Documents",
    "Loader",
    "build_dataset",
    "documents",
    "pack",
    "prefetch",
]
