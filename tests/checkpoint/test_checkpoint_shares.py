"""Who writes what: every element once, by a process that holds it, about as much each."""

import collections
import itertools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoint.shares import holders_of, shares_of, stored_specs
from parallelism.layout import Layout, Logical, Stored

F32 = np.dtype(np.float32)


def stored(draw, number):
    """An array or a stack of them, padded or not, cut into boxes, each held by some processes."""
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=2)))
    parts = draw(st.none() | st.integers(1, 3))
    padded = tuple(n + draw(st.integers(0, 2)) for n in shape)
    logical = tuple(Logical(f"{number}.{i}", shape, F32, (None,) * len(shape)) for i in range(parts or 1))
    whole = (parts, *padded) if parts else padded
    return Stored(str(number), whole, F32, (None,) * len(whole), logical, parts is not None)


def boxes(draw, shape):
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    spans = [list(itertools.pairwise(c)) or [(0, 0)] for c in cuts]
    return [tuple(s[i] for s, i in zip(spans, at, strict=True)) for at in np.ndindex(*map(len, spans))]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_element_is_written_once_by_a_process_that_holds_it(data):
    draw = data.draw
    count = draw(st.integers(1, 4))
    layout = Layout([stored(draw, n) for n in range(draw(st.integers(1, 4)))])
    processes = st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True).map(sorted)
    holders = {key: {box: draw(processes) for box in boxes(draw, s.shape)} for key, s in layout.items()}
    chunk_bytes = draw(st.integers(4, 64))
    written = {spec.name: np.zeros(spec.shape, int) for spec in stored_specs(layout)}
    for process in range(count):
        for key, own in shares_of(layout, holders, process, chunk_bytes).items():
            for box, shares in own:
                assert process in holders[key][box]
                held = np.empty([hi - lo for lo, hi in box], F32)
                for share in shares:
                    assert held[share.within].shape == share.shape
                    at = tuple(slice(a, a + n) for a, n in zip(share.start, share.shape, strict=True))
                    written[share.logical.name][at] += 1
    assert all((times == 1).all() for times in written.values())


def test_replicas_share_the_writing_evenly_whatever_the_sizes():
    sizes = [1000, 1, 1, 300, 300, 20, 5]
    logical = [Logical(f"w{i}", (n, 16), F32, (None, None)) for i, n in enumerate(sizes)]
    layout = Layout([Stored(x.name, x.shape, x.dtype, x.axes, (x,)) for x in logical])
    holders = {x.name: {((0, x.shape[0]), (0, 16)): range(4)} for x in logical}
    loads = [
        sum(share.nbytes for own in shares_of(layout, holders, p, 1024).values() for _, s in own for share in s)
        for p in range(4)
    ]
    assert sum(loads) == sum(sizes) * 64
    assert max(loads) <= 1.05 * sum(loads) / 4


def test_a_replica_counts_what_its_process_writes_alone():
    """Half is process 0's alone: process 1 writes what both hold."""
    alone, both = (Logical(name, (64, 16), F32, (None, None)) for name in ("alone", "both"))
    layout = Layout([Stored(x.name, x.shape, x.dtype, x.axes, (x,)) for x in (alone, both)])
    whole = ((0, 64), (0, 16))
    holders = {"alone": {whole: [0]}, "both": {whole: [0, 1]}}
    loads = [
        sum(share.nbytes for own in shares_of(layout, holders, p, 256).values() for _, s in own for share in s)
        for p in (0, 1)
    ]
    assert loads == [4096, 4096]


def test_holders_are_the_processes_of_the_devices_of_a_box():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    spec = Logical("w", (8, 4), F32, (None, None))
    layout = Layout([Stored("w", spec.shape, spec.dtype, spec.axes, (spec,))])
    found = holders_of(layout, {"w": NamedSharding(mesh, PartitionSpec("fsdp"))})["w"]
    assert found == {((2 * i, 2 * i + 2), (0, 4)): (0,) for i in range(4)}
    counted = collections.Counter(box for box, _ in shares_of(layout, {"w": found}, 0, 1 << 20)["w"])
    assert counted == dict.fromkeys(found, 1)
