"""Chunks as zstd frames."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from checkpoint import Level, Manager, open_checkpoint
from parallelism.layout import Layout, Logical, Stored


def state_of(values):
    specs = [Logical(name, v.shape, v.dtype, (None,) * v.ndim) for name, v in values.items()]
    layout = Layout([Stored(s.name, s.shape, s.dtype, s.axes, (s,)) for s in specs])
    device = SingleDeviceSharding(jax.devices()[0])
    return layout, {name: jax.device_put(v, device) for name, v in values.items()}


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    return {
        "zeros": np.zeros((64, 64), np.float32),
        "random": rng.integers(0, 256, (64, 64), np.uint8),
        "few": rng.integers(0, 3, (33,)).astype(np.float32),
    }


def restored(manager, layout, sharding=None):
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    return manager.restore(layout=layout, shardings=dict.fromkeys(layout, sharding))


def test_what_compresses_is_smaller_and_comes_back(tmp_path, values):
    layout, arrays = state_of(values)
    with Manager([Level("disk", tmp_path, zstd=3)]) as manager:
        written = manager.save(1, arrays, layout, {}).wait().levels["disk"].nbytes
        for name, value in restored(manager, layout).arrays.items():
            np.testing.assert_array_equal(np.asarray(value), values[name])
        chunks = {n: a.chunks[0] for n, a in open_checkpoint(tmp_path / "step-00000001").manifest.arrays.items()}
        assert chunks["zeros"].zstd[0] < 1000 < chunks["random"].whole_bytes
        assert chunks["random"].zstd is None
        assert written == sum(c.stored_bytes for c in chunks.values())
        assert manager.save(2, arrays, layout, {}).wait().levels["disk"].nbytes == 0


def test_a_shard_of_a_compressed_chunk(tmp_path, values):
    layout, arrays = state_of(values)
    with Manager([Level("disk", tmp_path, zstd=3)]) as manager:
        manager.save(1, arrays, layout, {}).wait()
        mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        del arrays["few"]
        found = manager.restore(
            layout=state_of({k: values[k] for k in arrays})[0],
            shardings=dict.fromkeys(arrays, NamedSharding(mesh, PartitionSpec(None, "x"))),
            partial=True,
        )
    for name in arrays:
        np.testing.assert_array_equal(np.asarray(found.arrays[name]), values[name])


def test_every_flipped_bit_is_found_and_mended(tmp_path, values):
    values = {"a": values["few"], "b": values["zeros"][:2]}
    layout, arrays = state_of(values)
    with Manager([Level("disk", tmp_path / "disk", zstd=3), Level("other", tmp_path / "other")]) as manager:
        manager.save(1, arrays, layout, {}).wait()
        (file,) = (tmp_path / "disk" / "step-00000001").glob("data-*")
        good = file.read_bytes()
        for at in range(len(good)):
            damaged = bytearray(good)
            damaged[at] ^= 1 << at % 8
            file.write_bytes(damaged)
            assert not open_checkpoint(file.parent).verify().ok
            if at % 7 == 0:
                assert restored(manager, layout).sources[str(tmp_path / "other" / "step-00000001")] > 0
                assert file.read_bytes() == good
            file.write_bytes(good)


def test_the_reader_of_the_documentation_reads_frames(tmp_path, values):
    text = (Path(__file__).parents[2] / "docs" / "checkpoint-format.md").read_text()
    scope = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], scope)
    layout, arrays = state_of(values)
    with Manager([Level("disk", tmp_path, zstd=3)]) as manager:
        manager.save(1, arrays, layout, {}).wait()
    for name, value in values.items():
        np.testing.assert_array_equal(scope["read"](tmp_path / "step-00000001", name), value)
