"""Attention over pages: the kernels of TPU and GPU, interpreted, against XLA's form and a loop over rows.

By default a pairwise covering set of shapes; with ``-m slow`` their full product (768 cases, half an hour).
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from covering import cases, pairwise, product
from jax.experimental.pallas import tpu as pltpu

from jaxsys.kernels import paged, paged_gpu, paged_tpu
from jaxsys.kernels.paged import Paged

L, LAYER = 3, 1
FORMS = {"xla": paged.reference, "tpu": paged_tpu.attend, "gpu": paged_gpu.attend}
KERNELS = ("tpu", "gpu")
FACTORS = {
    "h": (128, 64),
    "page": (16, 64),
    "G": (3, 1, 8),
    "K": (2, 3),
    "queries": (4, 1),
    "softcap": (None, 2.0),
    "windowed": (False, True),
    "programs": (264, 1),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a sequence has several."""
    monkeypatch.setattr(paged_tpu, "BLOCK_BYTES", 48 << 10)
    monkeypatch.setattr(paged_gpu, "BLOCK", 16)


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape: key/value heads, query heads of each, head size, page size, queries an item; programs of a GPU."""

    K: int = 2
    G: int = 3
    h: int = 128
    page: int = 16
    queries: int = 4
    softcap: float | None = None
    windowed: bool = False
    programs: int = 264

    items, columns = 5, 6

    @property
    def sequences(self):
        return self.items - 1


def packing(case, chunks, rng, replicas=1):
    """A ``Paged`` of chunks [(start, count)] a replica, its pages anywhere; single rows in a table of their own."""
    N, Q, page = case.sequences, case.queries, case.page
    T = case.items * Q
    P = N * case.columns + 1
    positions, sequences, places = (np.full((replicas, T), fill, np.int32) for fill in (-1, 0, 0))
    items, singles = (np.full((replicas, *shape), T, np.int32) for shape in ((case.items, Q), (N, 1)))
    table = np.zeros((replicas, N, case.columns), np.int32)
    for r in range(replicas):
        free = list(rng.permutation(np.arange(1, P)))
        row = item = single = 0
        for n, (start, count) in enumerate(chunks):
            if count == 1 and Q > 1:
                positions[r, row], sequences[r, row], places[r, row] = start, n, case.items * Q + single
                singles[r, single] = row
                row, single, count = row + 1, single + 1, 0
            for offset in range(count):
                positions[r, row], sequences[r, row] = start + offset, n
                places[r, row] = item * Q + offset
                items[r].reshape(-1)[places[r, row]] = row
                row += 1
            reach = (start + max(count, 1) - 1) // page + 1
            table[r, n, :reach] = [free.pop() for _ in range(reach)]
            item += -(-count // Q)
        assert item <= case.items and row <= T
    return Paged(positions, sequences, table, (items, singles) if Q > 1 else (items,), places)


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
def compiled(case, name, interpret):
    """``attend_written`` by a form: one program for all packings of a case."""
    form = FORMS[name] if name == "xla" else functools.partial(FORMS[name], interpret=interpret)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is what takes long
    def run(q, context, keys, values, window):
        return paged.attend_written(
            q, context, keys, values, LAYER, case.K // keys.shape[3], form,
            window=window if case.windowed else None, scale=case.h**-0.5, softcap=case.softcap,
        )  # fmt: skip

    return run


def run(case, name, context, q, keys, values, window, interpret=True):
    """[rows used, H, h]"""
    if name == "tpu":
        together = 2 if case.h == 64 and case.K % 2 == 0 else 1
        keys, values = (side_by_side(pool, together, 128) for pool in (keys, values))
    out = compiled(case, name, interpret)(q, context, keys, values, np.int32(window))
    return np.asarray(out)[context.positions >= 0]


def side_by_side(pool, together, width):
    """As a TPU keeps it: ``together`` heads in a row of ``width``."""
    R, layers, P, K, page, h = pool.shape
    pool = pool.reshape(R, layers, P, K // together, together, page, h).swapaxes(4, 5)
    pool = pool.reshape(R, layers, P, K // together, page, together * h)
    return np.pad(pool, ((0, 0),) * 5 + ((0, width - together * h),))


def assert_near(found, expected):
    """By the norm. Single elements of sums over 128 products in float32 are up to 1.6e-6 from a loop in float64, the
    whole within 5e-7."""
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=3e-6)


def equals_the_plain_form_and_a_loop(case, name, monkeypatch, trials=6):
    monkeypatch.setattr(paged_gpu, "PROGRAMS", case.programs)
    rng = np.random.default_rng(0)
    for trial in range(trials):
        context = packing(case, random_chunks(case, rng) if trial else [], rng)
        window = int(rng.choice([1, 5, case.page, 40]))
        q, keys, values = material(case, context, rng)
        found, plain = (run(case, form, context, q, keys, values, window) for form in (name, "xla"))
        assert_near(found, plain)
        expected = oracle(case, context, q, keys, values, window if case.windowed else None)
        assert_near(found, expected[context.positions >= 0])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", [Case(**case) for case in pairwise(FACTORS, [])], ids=str)
def test_a_kernel_equals_the_plain_form_and_a_loop_over_rows(name, case, monkeypatch):
    equals_the_plain_form_and_a_loop(case, name, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", [Case(**case) for case in cases(FACTORS, product(FACTORS, []))], ids=str)
def test_every_shape_equals_the_plain_form_and_a_loop_over_rows(name, case, monkeypatch):
    equals_the_plain_form_and_a_loop(case, name, monkeypatch, trials=4)


@pytest.mark.parametrize("name", FORMS)
def test_a_rows_result_depends_neither_on_its_batch_nor_on_where_its_pages_lie(name):
    """To the bit: alone, as another sequence in other items among others, and in a shorter chunk."""
    case, rng = Case(windowed=True), np.random.default_rng(1)
    own = rng.standard_normal((3, 96, case.K * case.G, case.h)).astype(np.float32)

    def results(chunks, n):
        """Of positions 37 to 39 or less, of sequence n."""
        context = packing(case, chunks, rng)
        q, keys, values = material(case, context, rng)
        mine = (context.sequences == n) & (context.positions >= 0)
        for r, t in zip(*np.nonzero(mine), strict=True):
            q[r, t] = own[0, context.positions[r, t]]
        for position in range(context.positions[mine].max() + 1):
            at = 0, LAYER, context.page_table[0, n, position // case.page], slice(None), position % case.page
            keys[at], values[at] = own[1:, position, : case.K]
        out = run(case, name, context, q, keys, values, 30)
        return out[mine[context.positions >= 0]]

    alone = results([(37, 3)], 0)
    for chunks, n in (([(5, 4), (90, 6), (37, 3)], 2), ([(0, 1), (37, 3), (64, 1)], 1), ([(20, 2), (37, 2)], 1)):
        np.testing.assert_array_equal(results(chunks, n), alone[: chunks[n][1]])


def test_replicas_are_items_of_one_launch():
    case, rng = Case(K=1, G=2), np.random.default_rng(2)
    context = packing(case, [(30, 5), (2, 3)], rng, replicas=2)
    q, keys, values = material(case, context, rng, replicas=2)
    plain = run(case, "xla", context, q, keys, values, 0)
    for name in KERNELS:
        assert_near(run(case, name, context, q, keys, values, 0), plain)


def test_the_tpu_kernel_reads_no_page_before_it_has_come_and_writes_none_that_is_in_use(capfd):
    """A copy is carried out when it is waited for, memory is NaN before, and two that touch it unordered are told."""
    case, rng = Case(windowed=True, K=1, G=1), np.random.default_rng(3)
    interpret = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan", detect_races=True)
    context = packing(case, [(0, 1), (70, 7), (90, 4)], rng)
    material_ = material(case, context, rng)
    found = run(case, "tpu", context, *material_, 50, interpret=interpret)
    assert_near(found, run(case, "xla", context, *material_, 50))
    assert "RACE" not in "".join(capfd.readouterr()).upper()
