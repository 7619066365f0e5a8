"""The executor against the model without a pipeline, in float64 on eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pipelines.execute import stack, unstack, value_and_grad
from pipelines.generators import GENERATORS

D, ROWS, VOCAB = 8, 6, 11


class Toy:
    """Pre-norm MLP layers with a tied embedding, and a loss of each layer's own."""

    def embed(self, shared, batch):
        return shared["table"][batch["tokens"]]

    def context(self, batch):
        return jnp.cos(batch["tokens"])[:, None].astype(self.dtype)

    def layer(self, params, x, context, index):
        y = x * params["scale"] / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        y = jnp.tanh(y @ params["up"].T + index.astype(x.dtype)) * context
        out = x + y @ params["down"].T
        return out, 1e-2 * (y * y).sum()

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
    total = 0.0
    for m in range(batches["tokens"].shape[0]):
        batch = jax.tree.map(lambda a, m=m: a[m], batches)
        x, context = model.embed(shared, batch), model.context(batch)
        for i, params in enumerate(layers):
            x, aux = model.layer(params, x, context, jnp.int32(i))
            total += aux
        total += model.head(shared, x, batch)
    return total


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", sorted(GENERATORS))
@pytest.mark.parametrize(("stages", "layers"), [(2, 5), (4, 9)])
def test_loss_and_gradients_are_those_of_the_model_without_a_pipeline(name, stages, layers):
    table = GENERATORS[name](stages, 2 * stages)
    model = Toy()
    shared, each, batches = make(layers, 2 * stages)
    mesh = Mesh(np.array(jax.devices()[:stages]), ("stage",))
    run = jax.jit(value_and_grad(model, table, layers, mesh))
    loss, (d_shared, d_layers) = run(shared, stack(each, table.placement), batches)
    expected, (e_shared, e_layers) = jax.value_and_grad(plain, (1, 2))(model, shared, each, batches)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    found = d_shared, unstack(d_layers, layers, table.placement)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves((e_shared, e_layers)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-9 * np.linalg.norm(b)
