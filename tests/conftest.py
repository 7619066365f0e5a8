"""Eight virtual CPU devices for every test, and one compile cache for all: set before jax is imported."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Compiled programs outlive the tests, in .cache/ of the repository; data made by a test does not.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAXSYS_CACHE", tempfile.mkdtemp(prefix="jaxsys-tests-"))

import pytest


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A directory with a ``tokenizer`` and a folder of ``text``."""
    from tiny_runs import write_text, write_tokenizer

    path = tmp_path_factory.mktemp("material")
    write_tokenizer(path / "tokenizer")
    write_text(path / "text")
    return path
