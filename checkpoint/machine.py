"""Which machine this is, and which process: names that tell apart what lives and what does not."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def machine() -> str:
    """What tells apart the spaces in which process numbers mean something: the machine, its start, the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # not Linux: like no other


def process(pid: int) -> str | None:
    """Its number and when it began, since numbers are used again; None if there is no such process."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else f"{pid} {rest[18]}"
