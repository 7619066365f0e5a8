"""Malloc's tunables: set once, and they do what they are for."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from jaxsys.malloc import TUNABLES

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not ENABLED.exists() or "[never]" in ENABLED.read_text(),
    reason="needs glibc and huge pages",
)
RESTART = "from jaxsys.malloc import restart_with_tunables; restart_with_tunables()\n"
TUNED = ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())
# Page faults of the last of three times that a thread takes and gives back 96 MiB.
FAULTS = """
import resource, threading, numpy
def launch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.empty(96 << 20, numpy.uint8).fill(1)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
found = []
for _ in range(3):
    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
print(found[-1])
"""


def output(code, tunables):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "GLIBC_TUNABLES": tunables}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", TUNED),
        ("glibc.rtld.optional_static_tls=512", f"glibc.rtld.optional_static_tls=512:{TUNED}"),
        ("glibc.malloc.check=0", "glibc.malloc.check=0"),  # somebody's own
    ],
)
def test_a_process_begins_again_with_them_unless_malloc_is_tuned(before, after):
    assert output(RESTART + "import os; print(os.environ['GLIBC_TUNABLES'])", before) == after


def test_a_launch_finds_the_memory_that_the_last_one_left():
    assert int(output(FAULTS, TUNED)) < 20  # of the thread itself
    assert int(output(FAULTS, "glibc.malloc.hugetlb=1")) > 40  # 48 huge pages, or 24,576 small ones
