"""Attention over pages: the kernels of TPU and GPU, interpreted, against XLA's form, and that against a loop."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxsys.kernels import paged, paged_gpu, paged_tpu
from jaxsys.kernels.paged import Paged

L, LAYER = 3, 1
FORMS = {"tpu": paged_tpu.attend, "gpu": paged_gpu.attend}


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape: key/value heads, query heads of each, head size, page size, items, queries an item, pages a sequence."""

    K: int = 2
    G: int = 3
    h: int = 128
    page: int = 16
    items: int = 5
    queries: int = 4
    columns: int = 6
    softcap: float | None = None
    windowed: bool = False

    @property
    def sequences(self):
        return self.items - 1


def packing(case, chunks, rng, replicas=1):
    """A ``Paged`` of chunks [(start, count)] a replica, its pages anywhere."""
    N, Q, page = case.sequences, case.queries, case.page
    T = case.items * Q
    P = N * case.columns + 1
    positions, sequences, places = (np.full((replicas, T), fill, np.int32) for fill in (-1, 0, 0))
    items = np.full((replicas, case.items, Q), T, np.int32)
    table = np.zeros((replicas, N, case.columns), np.int32)
    for r in range(replicas):
        free = list(rng.permutation(np.arange(1, P)))
        row = item = 0
        for n, (start, count) in enumerate(chunks):
            for offset in range(count):
                positions[r, row], sequences[r, row] = start + offset, n
                places[r, row] = (item + offset // Q) * Q + offset % Q
                items[r].reshape(-1)[places[r, row]] = row
                row += 1
            reach = (start + count - 1) // page + 1
            table[r, n, :reach] = [free.pop() for _ in range(reach)]
            item += -(-count // Q)
        assert item <= case.items and row <= T
    return Paged(positions, sequences, table, items, places)


def random_chunks(case, rng):
    """Sequences that together fill some of the items: long and short, from their beginning or later."""
    chunks, left = [], case.items
    for _ in range(int(rng.integers(0, case.sequences + 1))):
        if left == 0:
            break
        count = int(rng.integers(1, min(left, 2) * case.queries + 1))
        left -= -(-count // case.queries)
        longest = case.columns * case.page - count
        chunks.append((int(rng.integers(0, (longest, 2 * case.page)[int(rng.integers(2))] + 1)), count))
    return chunks


def material(case, context, rng, replicas=1):
    """q [R, T, H, h] and a pool's keys and values [R, L, P, K, page, h]: NaN wherever no sequence has come."""
    P = case.sequences * case.columns + 1
    q = rng.standard_normal((replicas, context.positions.shape[1], case.K * case.G, case.h)).astype(np.float32)
    shape = (replicas, L, P, case.K, case.page, case.h)
    keys, values = (np.full(shape, np.nan, np.float32) for _ in range(2))
    for r in range(replicas):
        for n in range(case.sequences):
            mine = context.positions[r][(context.sequences[r] == n) & (context.positions[r] >= 0)]
            for position in range(mine.max(initial=-1) + 1):
                at = r, slice(None), context.page_table[r, n, position // case.page], slice(None), position % case.page
                for pool in (keys, values):
                    pool[at] = rng.standard_normal((L, case.K, case.h))
    return q, keys, values


def oracle(case, context, q, keys, values, window):
    out = np.zeros(q.shape)
    for r, t in zip(*np.nonzero(context.positions >= 0), strict=True):
        last = context.positions[r, t]
        seen = np.arange(0 if window is None else max(last - window + 1, 0), last + 1)
        pages = context.page_table[r, context.sequences[r, t], seen // case.page]
        k, v = (pool[r, LAYER][pages, :, seen % case.page].astype(np.float64) for pool in (keys, values))
        for head in range(case.K * case.G):
            s = k[:, head // case.G] @ q[r, t, head] / np.sqrt(case.h)
            s = s if case.softcap is None else case.softcap * np.tanh(s / case.softcap)
            p = np.exp(s - s.max())
            out[r, t, head] = p / p.sum() @ v[:, head // case.G]
    return out


@functools.lru_cache
def compiled(case, name, interpret=True):
    """``attend_written`` by a form, one compiled program a case."""
    form = paged.reference if name == "xla" else functools.partial(FORMS[name], interpret=interpret)

    @jax.jit
    def run(q, context, keys, values, window):
        together = case.K // keys.shape[3]
        return paged.attend_written(
            q, context, keys, values, LAYER, together, form,
            window=window if case.windowed else None, scale=case.h**-0.5, softcap=case.softcap,
        )  # fmt: skip

    return lambda *args: np.asarray(run(*args))


def stored(pool, width, together):
    """As a TPU keeps it: ``together`` heads in a row of ``width``."""
    R, layers, P, K, page, h = pool.shape
    pool = pool.reshape(R, layers, P, K // together, together, page, h).swapaxes(4, 5)
    pool = pool.reshape(R, layers, P, K // together, page, together * h)
    return np.pad(pool, ((0, 0),) * 5 + ((0, width - together * h),))


def run(case, name, context, q, keys, values, window, **options):
    if name == "tpu":
        together = 1 if case.h >= 128 or case.K % 2 else 2
        keys, values = (stored(pool, 128, together) for pool in (keys, values))
    return compiled(case, name, **options)(q, context, keys, values, np.int32(window))


CASES = {
    "128 wide": Case(),
    "64 wide": Case(h=64, K=2, G=1),
    "64 wide, odd heads": Case(h=64, K=3, G=3, page=64, columns=3),
    "one query": Case(queries=1, items=6, G=8, page=64, columns=3),
    "cap and window": Case(softcap=2.0, windowed=True),
    "window, long": Case(windowed=True, page=64, columns=8, G=1, queries=8, items=3),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernels_equal_the_plain_form_and_a_loop_over_rows(name, case):
    rng = np.random.default_rng(0)
    for trial in range(5):
        chunks = [] if trial == 0 else random_chunks(case, rng)
        context = packing(case, chunks, rng)
        window = int(rng.choice([1, 5, case.page, 40]))
        q, keys, values = material(case, context, rng)
        found = run(case, name, context, q, keys, values, window)
        plain = run(case, "xla", context, q, keys, values, window)
        used = context.positions >= 0
        np.testing.assert_allclose(found[used], plain[used], rtol=1e-6, atol=1e-6)
        expected = oracle(case, context, q, keys, values, window if case.windowed else None)
        np.testing.assert_allclose(found[used], expected[used], rtol=0, atol=2e-6)
