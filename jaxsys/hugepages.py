"""Huge pages for the temporaries of XLA on CPU.

XLA:CPU allocates a program's temporaries anew for each launch; in pages of 4 KiB the kernel spends more time faulting
them in than the program spends computing (a bfloat16 train step: 1,650 tokens/s, 2,650 with huge pages). glibc asks
for huge pages when ``glibc.malloc.hugetlb=1`` is in GLIBC_TUNABLES, which it reads only as a process starts.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Replaces this process by itself with the tunable set. For a program's first line: nothing else survives.

    Does nothing where the tunable is set already, where there is no glibc, or where the kernel never gives huge pages.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or platform.libc_ver()[0] != "glibc":
        return
    if not _ENABLED.exists() or "[never]" in _ENABLED.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
