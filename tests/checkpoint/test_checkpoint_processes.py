"""Two processes of one job: one checkpoint, restored by one process, and failures that all of them see."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from checkpoint import Level, Manager, open_checkpoint
from parallelism.errors import UserError
from parallelism.layout import Layout, Logical, Stored

SPEC = Logical("x", (8, 4), np.dtype(np.float32), ("a", "b"))
LAYOUT = Layout([Stored("x", SPEC.shape, SPEC.dtype, SPEC.axes, (SPEC,))])

WORKER = """
import logging, os, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
index, port, root = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize("127.0.0.1:" + port, 2, index)
from checkpoint import Level, Manager
from parallelism.coordinator import PeerError
from checkpoint.storage import LocalStore
from parallelism.layout import Layout, Logical, Stored

spec = Logical("x", (8, 4), np.dtype(np.float32), ("a", "b"))
layout = Layout([Stored("x", spec.shape, spec.dtype, spec.axes, (spec,))])
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), PartitionSpec("fsdp"))
host = np.arange(32, dtype=np.float32).reshape(8, 4)
x = jax.make_array_from_callback((8, 4), sharding, lambda index: host[index])
other = jax.make_array_from_callback((8, 4), sharding, lambda index: -1 - host[index])
manager = Manager([Level("ram", root + "/ram"), Level("disk", root + "/disk")])
manager.save(1, {"x": x}, layout, {}).wait()

create = LocalStore.create
def fails(store, directory, name):
    raise OSError(28, "No space left on device")
if index == 1:
    LocalStore.create = fails
try:
    manager.save(2, {"x": other}, layout, {}).wait()
except Exception as e:
    print(index, type(e).__name__)
LocalStore.create = create
written = manager.save(3, {"x": x}, layout, {}).wait().levels
print(index, *((name, each.nbytes, each.kept_bytes) for name, each in written.items()))
restored = manager.restore(layout=layout, shardings={"x": sharding})
for shard in restored.arrays["x"].addressable_shards:
    np.testing.assert_array_equal(np.asarray(shard.data), host[shard.index])
print(index, restored.step, restored.metrics.bytes_read, flush=True)
everywhere = NamedSharding(sharding.mesh, PartitionSpec())
LocalStore.cached = False
restored = manager.restore(layout=layout, shardings={"x": everywhere})
np.testing.assert_array_equal(np.asarray(restored.arrays["x"].addressable_data(0)), host)
print(index, "far", restored.metrics.bytes_needed, sum(restored.sources.values()), flush=True)
manager.close()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output lines of both workers, and the directory that they wrote."""
    root = tmp_path_factory.mktemp("processes")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(i), str(port), str(root)],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=90) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    return [out.splitlines() for out, _ in outputs], root


def test_processes_write_one_checkpoint_that_one_process_restores(run):
    _, root = run
    names = sorted(p.name for p in (root / "disk" / "step-00000001").iterdir())
    assert [name[:10] for name in names] == ["data-00000", "data-00001", "manifest.j"]
    assert open_checkpoint(root / "disk" / "step-00000001").verify().ok
    with Manager([Level("disk", root / "disk")]) as manager:
        restored = manager.restore(layout=LAYOUT, shardings={"x": SingleDeviceSharding(jax.devices()[0])})
    np.testing.assert_array_equal(np.asarray(restored.arrays["x"]), np.arange(32).reshape(8, 4))


def test_a_failure_in_one_process_fails_the_save_in_all_and_commits_nothing(run):
    (first, second), root = run
    assert first[0] == "0 PeerError"
    assert second[0] == "1 UserError"
    assert not list(root.glob("*/step-00000002")) + list(root.glob("*/.tmp*"))


def test_each_process_reads_only_its_shards(run):
    (first, second), _ = run
    assert (first[2], second[2]) == ("0 3 64", "1 3 64")


def test_what_both_need_from_far_away_comes_to_their_machine_once(run):
    (first, second), _ = run
    assert (first[3], second[3]) == ("0 far 128 64", "1 far 128 64")


def test_each_process_writes_nothing_that_is_there(run):
    (first, second), root = run
    assert first[1] == "0 ('ram', 0, 64) ('disk', 0, 64)" and second[1] == "1 ('ram', 0, 64) ('disk', 0, 64)"
    assert open_checkpoint(root / "disk" / "step-00000003").verify().ok


class Second:
    """The second of two processes; what the first says is given."""

    index, count = 1, 2

    def __init__(self, first):
        self.first = first

    def gather(self, channel, value):
        return [self.first, value]


def test_a_process_that_sees_another_directory_than_process_0_is_refused(tmp_path):
    other = Second({"error": None, "result": "the mark that process 0 left"})
    with pytest.raises(
        UserError, match=r"run on host .* is not the directory that process 0 writes: level 'disk' needs"
    ):
        Manager([Level("disk", tmp_path / "run")], coordinator=other)
