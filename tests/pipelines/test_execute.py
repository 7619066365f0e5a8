"""The executor against the model without a pipeline, in float64 on eight virtual devices."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import cases, pairwise, product
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from parallelism.errors import UserError
from pipelines.buffers import allocate
from pipelines.execute import refuse_permutations, refuse_unmoved, tell, value_and_grad
from pipelines.generators import GENERATORS
from pipelines.offload import offload
from pipelines.pieces import Pieces
from pipelines.schedule import Placement
from pipelines.simulate import Costs
from pipelines.split import passes

pytestmark = pytest.mark.usefixtures("cheap_machine_code")

D, ROWS, VOCAB = 8, 6, 11


class Toy:
    """Pre-norm MLP layers with a tied embedding, and a loss of each layer's own."""

    def place(self, x):
        return x

    def embed(self, shared, batch):
        return shared["table"][batch["tokens"]]

    def context(self, batch):
        return jnp.cos(batch["tokens"])[:, None].astype(self.dtype)

    def layer(self, params, x, context, index):
        y = x * params["scale"] / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        y = jnp.tanh(y @ params["up"].T + index.astype(x.dtype)) * context
        out = x + y @ params["down"].T
        return out, 1e-2 * (y * y).sum(), {"norm": (x * x).sum(-1)}

    def head(self, shared, x, batch):
        logits = jax.nn.log_softmax((x * shared["norm"]) @ shared["table"].T)
        return -jnp.take_along_axis(logits, batch["targets"][:, None], 1).sum()

    def __init__(self, dtype=jnp.float64):
        self.dtype = dtype


def make(layers, microbatches, dtype=jnp.float64):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.3, dtype)

    shared = {"table": normal(VOCAB, D), "norm": 1 + normal(D)}
    each = [{"scale": 1 + normal(D), "up": normal(2 * D, D), "down": normal(D, 2 * D)} for _ in range(layers)]
    tokens = {name: jnp.asarray(rng.integers(0, VOCAB, (microbatches, ROWS))) for name in ("tokens", "targets")}
    return shared, each, tokens


def plain(model, shared, layers, batches):
    total, told = 0.0, {}
    for m in range(batches["tokens"].shape[0]):
        batch = jax.tree.map(lambda a, m=m: a[m], batches)
        x, context = model.embed(shared, batch), model.context(batch)
        for i, params in enumerate(layers):
            x, aux, more = model.layer(params, x, context, jnp.int32(i))
            total += aux
            told[i] = jax.tree.map(jnp.add, told[i], more) if i in told else more
        total += model.head(shared, x, batch)
    return total, [told[i] for i in range(len(layers))]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


FACTORS = {
    "schedule": tuple(GENERATORS),
    "stages": (2, 4),
    "times": (1, 2, 4),  # as many microbatches as stages
    "form": ("plain", "full offload", "selective", "recompute"),
    "axis": ("alone", "fsdp", "tensor"),
}


def possible(schedule, times, form):
    """Where W is apart nothing is computed again, and all that is held waits for it: nothing can be moved under
    zb-h1."""
    apart, moved = np.char.startswith(schedule, "zb"), np.isin(form, ("full offload", "selective"))
    return ~(apart & (form == "recompute")) & ~((schedule == "zb-h1") & moved)


def named(case):
    return pytest.param(case, id="-".join(str(value) for value in case.values()))


@pytest.mark.parametrize("case", map(named, pairwise(FACTORS, (possible,), seed=3)))
def test_loss_and_gradients_are_those_of_the_model_without_a_pipeline(case):
    check(**case)


@pytest.mark.slow
@pytest.mark.parametrize("case", map(named, cases(FACTORS, product(FACTORS, (possible,)))))
def test_every_combination(case):
    check(**case)


@cache
def without_a_pipeline(layers, microbatches, model):
    """Loss, what layers tell, and gradients: op by op, so that it takes as long as to compile most pipelines."""
    return jax.value_and_grad(plain, (1, 2), has_aux=True)(model, *make(layers, microbatches))


TOY = Toy()


def check(schedule, stages, times=2, form="plain", axis="alone", head=0.0, model=None, **options):
    model = model or TOY
    table = GENERATORS[schedule](stages, times * stages)
    held, least = allocate(table).made.depth, 1
    if "offload" in form or form == "selective":
        costs = Costs(residual=1.0, link=1e9, pieces=4)
        fewest = next(n for n in range(1, held + 1) if able(table, costs, n))
        least = fewest if "full" in form else max(held - 1, fewest)
        table = offload(table, costs, least).table
        assert allocate(table).made.depth == least < held
    layers, microbatches = 2 * stages + 1, times * stages
    shared, each, batches = make(layers, microbatches)
    (expected, e_told), e_gradients = without_a_pipeline(layers, microbatches, model)
    pieces = Pieces.even(layers, table.placement, head)
    stacked = pieces.stack(each)
    shape, names = ((stages,), ("stage",)) if axis == "alone" else ((stages, 2), ("stage", axis))
    mesh = Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), names)
    if axis != "alone":
        out = PartitionSpec("stage", None, None, axis)
        specs = {"scale": PartitionSpec("stage"), "up": out, "down": out}
        if axis == "tensor":
            specs["down"] = PartitionSpec("stage", None, None, None, axis)
        stacked = {key: jax.device_put(a, NamedSharding(mesh, specs[key])) for key, a in stacked.items()}
        rows = NamedSharding(mesh, PartitionSpec(None, axis) if axis == "fsdp" else PartitionSpec())
        batches = jax.device_put(batches, rows)
    run = value_and_grad(model, table, pieces, mesh, recompute="recompute" in form, **options)
    (loss, told), (d_shared, d_layers) = jax.jit(run)(shared, stacked, batches)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    each_told, each_d = map(pieces.unstack, (told, d_layers))
    found = jax.tree.map(np.asarray, (d_shared, each_d, each_told))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves((*e_gradients, e_told)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-9 * np.linalg.norm(b)


def able(table, costs, slots):
    try:
        return offload(table, costs, slots) is not None
    except UserError:
        return False


@pytest.mark.parametrize("form", ["recompute, full offload", "recompute, some offload"])
def test_what_came_in_may_lie_in_host_memory(form):
    check("1f1b", 4, form=form)


@pytest.mark.parametrize("name", ["eager", "zb-h1"])
def test_a_layer_may_keep_less(name):
    check(name, 2, remat=partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable))


@pytest.mark.parametrize("name", ["1f1b", "zb-v"])
def test_layers_may_be_dealt_out_unevenly(name):
    check(name, 2, head=2.0)


@pytest.mark.parametrize(
    ("layers", "placement", "head", "expected"),
    [
        (30, Placement(4), 0.0, (8, 8, 7, 7)),
        (30, Placement(4), 8.0, (10, 9, 9, 2)),
        (30, Placement(4), 2.5, (8, 8, 8, 6)),
        (9, Placement(2, 2), 0.0, (3, 2, 2, 2)),
        (9, Placement(2, 2, "v"), 2.0, (2, 3, 2, 2)),
    ],
)
def test_the_head_counts_where_layers_are_dealt_out(layers, placement, head, expected):
    assert Pieces.even(layers, placement, head).counts == expected


class Dropout(Toy):
    """With a mask that a row's key and the layer give, whatever the microbatch."""

    def context(self, batch):
        return super().context(batch), batch["tokens"] * 7919 + batch["targets"]

    def layer(self, params, x, context, index):
        y, *others = super().layer(params, x, context[0], index)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(jax.random.key(3), row), index))(context[1])
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.7, (D,)))(keys)
        return x + jnp.where(kept, y - x, 0) / 0.7, *others


@pytest.mark.parametrize("form", ["plain", "recompute"])
def test_dropout_by_layer_and_row_is_that_of_the_model_without_a_pipeline(form):
    check("1f1b", 2, form=form, model=Dropout())


def test_what_cannot_run_is_refused():
    mesh = Mesh(np.array(jax.devices()[:2]), ("stage",))
    with pytest.raises(UserError, match="mesh axis stage=2: expected the 4 stages of the schedule '1f1b'"):
        value_and_grad(Toy(), GENERATORS["1f1b"](4, 8), Pieces.even(8, Placement(4)), mesh)
    with pytest.raises(UserError, match=r"layers dealt out for .*chunks=2.*, expected .*chunks=1.* of '1f1b'"):
        value_and_grad(Toy(), GENERATORS["1f1b"](2, 4), Pieces.even(8, Placement(2, 2)), mesh)
    with pytest.raises(UserError, match="schedule 'zb-h1': recompute with B and W apart"):
        value_and_grad(Toy(), GENERATORS["zb-h1"](2, 4), Pieces.even(8, Placement(2)), mesh, recompute=True)
    with pytest.raises(UserError, match="found 3 layers for 2 stages of 2 chunks, expected at least 4"):
        Pieces.even(3, Placement(2, 2))
    with pytest.raises(UserError, match=r"layers dealt out as \[3, 0\]: expected at least one"):
        Pieces(Placement(2), (3, 0))


@pytest.mark.parametrize(
    ("layers", "microbatches", "message"),
    [
        (4, 2, r"the batches\['targets'\]: shape \[2, .*\], expected 4 first: one a microbatch of the schedule '1f1b"),
        (4, 6, r"the batches.*shape \[6, .*expected 4 first"),
        (8, 4, r"the stacked layers.*: shape \[2, 1, 4.*\], expected 2, 1, 2 first"),
        (2, 4, r"the stacked layers.*: shape \[2, 1, 1.*\], expected 2, 1, 2 first"),
    ],
)
def test_arguments_of_other_sizes_are_refused(layers, microbatches, message):
    """A slice beyond the end is moved inside without a word."""
    table, mesh = GENERATORS["1f1b"](2, 4), Mesh(np.array(jax.devices()[:2]), ("stage",))
    shared, each, batches = make(layers, microbatches)
    stacked = Pieces.even(layers, table.placement).stack(each)
    for run in (value_and_grad, tell):
        with pytest.raises(UserError, match=message):
            run(Toy(), table, Pieces.even(4, table.placement), mesh)(shared, stacked, batches)


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda x: x, r"layer gives a float64\[6, 8\], expected what the next gets, a loss, what it tells"),
        (
            lambda x: (x.astype(jnp.float32), 0.0, None),
            r"layer gives float32\[6, 8\] for float64\[6, 8\], expected",
        ),
        (lambda x: ((x, x), 0.0, None), r"layer gives tuple of float64\[6, 8\], float64\[6, 8\] for"),
        (lambda x: (x, x, None), r"a layer's loss is float64\[6, 8\], expected a scalar"),
    ],
)
def test_a_layer_that_gives_something_else_is_refused(gives, message):
    class Wrong(Toy):
        def layer(self, params, x, context, index):
            return gives(x)

    table, mesh = GENERATORS["1f1b"](2, 4), Mesh(np.array(jax.devices()[:2]), ("stage",))
    pieces = Pieces.even(2, table.placement)
    shared, each, batches = make(2, 4)
    with pytest.raises(UserError, match=message):
        value_and_grad(Wrong(), table, pieces, mesh)(shared, pieces.stack(each), batches)


def test_another_number_of_layers_is_not_stacked():
    with pytest.raises(UserError, match="9 layers: expected 4, which the pieces are of"):
        Pieces.even(4, Placement(2)).stack([{"a": jnp.zeros(2)}] * 9)


def test_what_layers_tell_is_counted_beyond_what_their_dtype_can_add():
    """In bfloat16 256 + 1 is 256; and a number that is no array counts, too."""

    class Telling(Toy):
        def layer(self, params, x, context, index):
            return x, 0.0, {"rows": jnp.ones((), jnp.bfloat16), "calls": 1}

    table, mesh = GENERATORS["1f1b"](2, 300), Mesh(np.array(jax.devices()[:2]), ("stage",))
    pieces = Pieces.even(2, table.placement)
    shared, each, batches = make(2, 300)
    (_, told), _ = value_and_grad(Telling(), table, pieces, mesh)(shared, pieces.stack(each), batches)
    np.testing.assert_array_equal(told["rows"], np.full((2, 1, 1), 300, np.float32))
    np.testing.assert_array_equal(told["calls"], np.full((2, 1, 1), 300))


def test_an_offload_that_the_program_does_not_perform_is_refused():
    table = offload(GENERATORS["1f1b"](2, 4), Costs(residual=1.0, link=1e9, pieces=4), 1).table
    refuse_unmoved(table, 17)
    refuse_unmoved(table, None)
    refuse_unmoved(GENERATORS["1f1b"](2, 4), 0)
    with pytest.raises(UserError, match="'1f1b' brings 4 residuals to host memory, and the compiled program has none"):
        refuse_unmoved(table, 0)


def kept_by(remat=lambda layer: layer, split=False):
    """Shapes of what one layer keeps, and saves from B for W."""
    shared, (layer,), batches = make(1, 1)
    batch = jax.tree.map(lambda a: a[0], batches)
    model = Toy()
    x, context = model.embed(shared, batch), model.context(batch)
    found = passes(
        remat(lambda params, x, context: model.layer(params, x, context, jnp.int32(3))), layer, x, context, split=split
    )
    return [a.shape for a in found.kept], [a.shape for a in found.saved], found.small


def test_weights_are_not_kept_and_remat_keeps_the_input():
    kept, saved, _ = kept_by()
    assert kept and not {(2 * D, D), (D, 2 * D), (D,)} & set(kept) and not saved
    kept, _, _ = kept_by(partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable))
    assert kept == [(ROWS, D)]


def test_b_and_w_are_cut_at_the_cotangents_of_linears():
    """W needs of B what the outputs of the two linears had for gradients; the gradient of the scale is B's."""
    _, saved, small = kept_by(split=True)
    assert sorted(saved) == [(ROWS, D), (ROWS, 2 * D)]
    assert small == (False, True, False)  # down, scale, up


class Shifted(Toy):
    """Sends rows to neighbours inside a layer."""

    def layer(self, params, x, context, index):
        y, *others = super().layer(params, x, context, index)
        return y + jnp.roll(y, 1, 0), *others


def test_what_holds_several_products_is_cut_as_well():
    """Experts are one ``shard_map``, a loop over weights is one scan: W is kept their cotangents, not gradients."""

    def layer(params, x, context):
        y, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])
        return x + y @ params["out"], jnp.zeros(()), ()

    shapes = {"w": (3, 8, 8), "out": (8, 8)}
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    found = passes(layer, params, jax.ShapeDtypeStruct((5, 8), np.float32), (), split=True)
    assert all(a.shape[-2:] == (5, 8) for a in found.saved), found.saved
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    x, dy = (jnp.asarray(rng.standard_normal((5, 8)), jnp.float32) for _ in range(2))
    *_, kept = found.forward(params, x, ())
    dx, small, saved = found.backward(params, (), kept, dy, jnp.ones(()))
    assert not small
    expected, dx_ = jax.vjp(lambda p, x: layer(p, x, ())[0], params, x)[1](dy)
    np.testing.assert_allclose(dx, dx_, rtol=1e-5, atol=1e-5)
    for got, name in zip(found.weights(params, (), kept, saved), sorted(shapes), strict=True):
        np.testing.assert_allclose(got, expected[name], rtol=1e-5, atol=1e-5)


def test_a_permutation_inside_a_stage_is_refused():
    table = GENERATORS["1f1b"](2, 4)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("stage", "context"))

    def text(model):
        shared, each, batches = make(2, 4)
        batches = jax.device_put(batches, NamedSharding(mesh, PartitionSpec(None, "context")))
        pieces = Pieces.even(2, table.placement)
        run = jax.jit(value_and_grad(model, table, pieces, mesh))
        return run.lower(shared, pieces.stack(each), batches).compile().as_text()

    refuse_permutations(text(Toy()))
    with pytest.raises(UserError, match=r"sends f64\[.*\] by collective-permute over another mesh axis"):
        refuse_permutations(text(Shifted()))


def test_the_program_grows_neither_with_microbatches_nor_with_layers():
    def equations(layers, microbatches):
        table, mesh = GENERATORS["1f1b"](4, microbatches), Mesh(np.array(jax.devices()[:4]), ("stage",))
        shared, each, batches = make(layers, microbatches)
        pieces = Pieces.even(layers, table.placement)
        lowered = jax.jit(value_and_grad(Toy(), table, pieces, mesh)).lower(shared, pieces.stack(each), batches)
        return len(lowered.as_text().splitlines())

    assert equations(4, 4) == equations(4, 32) == equations(12, 4)


def test_the_example_in_the_document_runs():
    text = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    scope = {}
    exec(text.split("```python")[1].split("```")[0], scope)
    model, layers = scope["Model"](), scope["layers"]

    def plain(shared, layers):
        total = 0.0
        for m in range(16):
            batch = {name: a[m] for name, a in scope["batches"].items()}
            x = model.embed(shared, batch)
            for params in layers:
                x = model.layer(params, x, (), 0)[0]
            total += model.head(shared, x, batch)
        return total

    loss, expected = jax.value_and_grad(plain, (0, 1))(scope["shared"], layers)
    np.testing.assert_allclose(scope["loss"], loss, rtol=1e-9)
    found = scope["of_shared"], scope["of_layers"]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
