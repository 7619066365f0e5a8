"""The formulas of docs/parallelism.md, "Bytes a step sends", against what compiled steps send.

On CPU: what is written by hand (context parallelism) or a plain sum (data). What the TPU's compiler makes of the other
axes is held in tests/integration/test_aot.py.
"""

import pytest

from jaxsys.models.config import ModelConfig
from jaxsys.train import DataConfig, TrainConfig
from jaxsys.train.abstract import AbstractRun
from jaxsys.train.explain import step_collectives
from parallelism.sequence import METHODS

MODEL = ModelConfig(
    "llama", vocab_size=256, d_model=32, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=8, d_ff=64, max_seq_len=128,
    windows=(16, None),
)  # fmt: skip
ROWS, LENGTH, F32 = 4, 64, 4


def collectives_of(mesh, **changes):
    config = TrainConfig(
        run="traffic", model=MODEL, mesh=mesh, data=DataConfig(batch_size=ROWS, seq_len=LENGTH), storage="stacked",
        compute_dtype="float32", **changes,
    )  # fmt: skip
    run = AbstractRun(config, MODEL)
    run.prepare()
    return run, step_collectives(run)


def context_bytes(method, n, c):
    """What attention of one layer sends over ``context=n``: (forward, backward); c: bytes of the compute dtype."""
    tokens = ROWS * LENGTH // n
    q, kv = tokens * MODEL.n_heads * MODEL.head_dim, tokens * MODEL.n_kv_heads * MODEL.head_dim
    head, asks, answers = F32 * tokens * MODEL.n_heads, 12 * tokens, 8 * tokens  # document, position; window
    return {
        "ring": ((n - 1) * (2 * c * kv + answers), n * (2 * (c + F32) * kv + answers)),
        "token_ring": (n * ((c + F32) * q + head + asks), n * ((c + 2 * F32) * q + 2 * head + asks)),
        "all_gather": ((n - 1) * (2 * c * kv + answers), (n - 1) * (2 * (c + F32) * kv + answers)),
        "all_to_all": (
            (n - 1) / n * (2 * c * kv + (c + F32) * q + head) + (n - 1) * asks,
            (n - 1) / n * (2 * (c + F32) * kv + (c + 2 * F32) * q + 2 * head) + (n - 1) * asks,
        ),
    }[method]


@pytest.mark.parametrize("method", METHODS)
def test_context_parallel_attention_sends_what_its_formula_says(method):
    _, found = collectives_of("context=4", context_method=method)
    sent = sum(c.sent for c in found if c.axes == ("context",) and "parallelism/sequence.py" in c.source)
    assert sent == MODEL.n_layers * sum(context_bytes(method, 4, F32))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_data_parallelism_all_reduces_every_gradient_once_a_microbatch(accumulate):
    run, found = collectives_of("data=2", accumulate=accumulate)
    parameters = sum(stored.nbytes for stored in run.plan.layout.values())
    sent = sum(c.sent for c in found if (c.kind, c.axes) == ("all-reduce", ("data",)))
    assert sent == pytest.approx(accumulate * 2 * (1 / 2) * parameters, rel=1e-3)  # and a few scalars
