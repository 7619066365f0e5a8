"""How glibc hands out the temporaries of XLA on CPU, which allocates a program's anew for each launch.

In pages of 4 KiB the kernel spends more time faulting them in than the program spends computing (a bfloat16 train
step: 1,650 tokens/s, 2,650 with huge pages). And what is given back to the kernel is slow to come again: a virtual
machine gives idle memory back to its host, so that the first prompt after a pause of seconds took 1.4 times as long.
So glibc is told to ask for huge pages, and to keep what is smaller than ``KEPT``, in one arena, as those of threads
hold 64 MiB each and send the rest to the kernel. A train step's temporaries are larger, and go back: kept, they would
be split by what is allocated between two launches, and the next launch would take as much again.
glibc reads its tunables only as a process starts.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

KEPT = 256 << 20
TUNABLES = {"hugetlb": 1, "arena_max": 1, "mmap_threshold": KEPT, "trim_threshold": 4 * KEPT}
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_tunables() -> None:
    """Replaces this process by itself with ``TUNABLES`` set. For a program's first line: nothing else survives.

    Does nothing where somebody has tuned malloc, where there is no glibc, or where the kernel never gives huge pages.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc." in tunables or platform.libc_ver()[0] != "glibc":
        return
    if not _ENABLED.exists() or "[never]" in _ENABLED.read_text():
        return
    ours = [f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items()]
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, *ours]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
