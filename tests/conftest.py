"""Eight virtual CPU devices for every test, and one compile cache for all: set before jax is imported."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Eight devices on the cores of other tests: XLA ends a process in which one waits a minute for another.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_collective_call_terminate_timeout_seconds=600")
# Compiled programs outlive the tests, in .cache/ of the repository; data made by a test does not.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY", "1")
os.environ.setdefault("JAXSYS_CACHE", tempfile.mkdtemp(prefix="jaxsys-tests-"))

import pytest

# What depends on JAX's interfaces, each behaviour once: the newest Python and JAX run these alone (marker smoke).
SMOKE = (
    "test_project.py",
    "parallelism/test_mesh.py",
    "parallelism/test_sharding.py",
    "checkpoint/test_checkpoint_reshard.py",
    "jaxsys/test_dispatch_graphs_live.py",
    "jaxsys/kernels",
    "jaxsys/models/test_families.py",
    "jaxsys/optim",
    "jaxsys/serve/test_sampler.py",
    "jaxsys/serve/test_engine.py",
    "jaxsys/train/test_step.py",
)


def pytest_collection_modifyitems(items):
    root = Path(__file__).parent
    for item in items:
        name = item.path.relative_to(root).as_posix()
        if any(name == part or name.startswith(part + "/") for part in SMOKE):
            item.add_marker("smoke")


@pytest.fixture(autouse=True)
def settings_of_jax_are_left_as_they_were():
    """64-bit types that a test leaves on change what later ones compile."""
    yield
    jax = sys.modules.get("jax")
    if jax is not None and jax.config.values["jax_enable_x64"]:
        jax.config.update("jax_enable_x64", False)
        pytest.fail("jax_enable_x64 is left on")


@pytest.fixture(scope="module")
def cheap_machine_code():
    """For what is compiled and runs for milliseconds; not where a test is of the bits of the machine code."""
    from tiny_models import quickly_compiled

    with quickly_compiled():
        yield


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A directory with a ``tokenizer`` and a folder of ``text``."""
    from tiny_runs import write_text, write_tokenizer

    path = tmp_path_factory.mktemp("material")
    write_tokenizer(path / "tokenizer")
    write_text(path / "text")
    return path
