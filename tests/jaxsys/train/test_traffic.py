"""The formulas of docs/parallelism.md, "Bytes a step sends", against what compiled steps send.

On CPU; what the TPU's compiler makes of ``fsdp`` and ``tensor`` is held in tests/integration/test_aot.py.
"""

import dataclasses

import pytest

from jaxsys.models.config import Experts, ModelConfig
from jaxsys.train import DataConfig, TrainConfig
from jaxsys.train.abstract import AbstractRun
from jaxsys.train.explain import step_collectives
from parallelism.sequence import METHODS

MODEL = ModelConfig(
    "llama", vocab_size=256, d_model=32, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=8, d_ff=64, max_seq_len=128,
    windows=(16, None),
)  # fmt: skip
ROWS, LENGTH, F32 = 4, 64, 4


def collectives_of(mesh, model=MODEL, **changes):
    config = TrainConfig(
        run="traffic", model=model, mesh=mesh, data=DataConfig(batch_size=ROWS, seq_len=LENGTH), storage="stacked",
        compute_dtype="float32", **changes,
    )  # fmt: skip
    run = AbstractRun(config, model)
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
    assert {c.kind for c in found} == {"all-reduce"}  # no activation is gathered


def test_fsdp_gathers_kernels_twice_and_sums_their_gradients():
    n = 4
    run, found = collectives_of(f"fsdp={n}")
    tables = {key: stored.nbytes for key, stored in run.plan.layout.items() if "vocab" in stored.axes}
    layers = sum(stored.nbytes for key, stored in run.plan.layout.items() if key.startswith("layers"))
    kernels = sum(s.nbytes for key, s in run.plan.layout.items() if key.startswith("layers") and "embed" in s.axes)
    sent = {}
    for each in found:
        assert each.axes == ("fsdp",)
        sent[each.kind] = sent.get(each.kind, 0) + each.sent
    part = (n - 1) / n
    assert sent["all-gather"] == part * (2 * kernels + tables["embed.kernel"] + 2 * tables["head.kernel"])
    assert sent["reduce-scatter"] == part * sum(tables.values())
    assert sent["all-reduce"] == pytest.approx(2 * part * layers, rel=2e-3)  # and the last norm, and scalars


@pytest.mark.parametrize("remat", ["none", "full"])
def test_tensor_parallelism_gathers_and_sums_activations(remat):
    n, again = 4, remat == "full"
    _, found = collectives_of(f"tensor={n}", remat=remat)
    tokens = ROWS * LENGTH
    part = (n - 1) / n * F32 * tokens * MODEL.d_model
    sent = {}
    for each in found:
        assert each.axes == ("tensor",)
        sent[each.kind] = sent.get(each.kind, 0) + each.sent
    # In each layer; then of the last hidden states and the gradient of the embedding's.
    assert sent["all-gather"] == part * (MODEL.n_layers * (4 + 2 * again) + 2)
    # In each layer; of embedded tokens and the gradient of the last hidden states; two sums of a token's logits.
    sums = 2 * part * (MODEL.n_layers * (7 + again) + 2) + 2 * 2 * (n - 1) / n * F32 * tokens
    assert sums <= sent["all-reduce"] < 1.005 * sums  # and gradients of norms, and scalars
    assert set(sent) == {"all-gather", "all-reduce"}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_experts_exchange_slots_for_the_worst_case_there_and_back(remat):
    n, E, k = 4, 8, 3
    model = dataclasses.replace(MODEL, windows=(), experts=Experts(E, k, 16))
    _, found = collectives_of(f"expert={n}", model, remat=remat)
    tokens = ROWS * LENGTH // n
    rows, counts = n * F32 * model.d_model * min(k, E // n) * tokens, F32 * E
    passes = 2 if remat == "none" else 3  # forward and backward; forward again
    again = 1 if remat == "none" else 2
    sent = {}
    for each in found:
        if each.kind == "all-to-all":
            sent[each.nbytes] = sent.get(each.nbytes, 0) + each.sent
    part = (n - 1) / n * model.n_layers
    assert sent == {rows: passes * 2 * part * rows, counts: again * part * counts}, found
