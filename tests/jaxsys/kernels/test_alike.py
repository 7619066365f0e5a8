import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.kernels.alike import LEAST_SUMMED, rows_alike
from jaxsys.kernels.matmul import linear
from jaxsys.kernels.paged import reference
from jaxsys.serve.sampler import log_probability

NUMBERS = (8, 16, 48, 64, 128)


def alike(fn):
    """``fn`` of an array of rows, compiled for each number of them, gives rows that do not depend on it."""

    def run(rows):
        with rows_alike():
            return np.asarray(jax.jit(lambda x: fn(x))(rows), np.float32)

    def check(x, numbers=NUMBERS):
        every = run(x)
        for n in numbers:
            np.testing.assert_array_equal(run(x[7 : 7 + n]), every[7 : 7 + n], err_msg=str(n))

    return check


@pytest.mark.parametrize(("f", "d"), [(1536, 576), (576, 1536), (192, 576), (48, 32)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products(f, d, dtype):
    rng = np.random.default_rng(0)
    kernel, x = jnp.asarray(rng.standard_normal((f, d)), dtype), jnp.asarray(rng.standard_normal((512, d)), dtype)
    alike(lambda x: linear(x, kernel))(x)


@pytest.mark.parametrize("of_a_row", [LEAST_SUMMED // 8, 576, 1031])
def test_sums_and_the_exponentials_before_them(of_a_row):
    """Of no less than so many elements: into a sum so large XLA:CPU takes the exp, which is another then."""
    x = 3 * np.random.default_rng(0).standard_normal((512, of_a_row)).astype(np.float32)
    tokens = jnp.arange(of_a_row)[:1]
    alike(lambda x: log_probability(x, jnp.broadcast_to(tokens, x.shape[:1])))(x)
    alike(lambda x: x.sum(-1))(x)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("queries", [16, 64])
def test_attention_over_pages(group, queries):
    """Of 64 tokens of a sequence as items of one query, and of several."""
    rng = np.random.default_rng(0)
    T, K, h, page = 64, 3, 64, 64
    q = rng.standard_normal((T, K, group, h)).astype(np.float32)
    keys, values = (rng.standard_normal((1, 3, K, page, h)).astype(np.float32) for _ in range(2))
    at = np.arange(40, 40 + T, dtype=np.int32)

    def attend(together):
        items = (T // together, together)
        rows = q.reshape(*items, K, group, h), at.reshape(items), np.zeros(items[0], np.int32)
        pages = jnp.array([[1, 2]]), jnp.asarray(keys), jnp.asarray(values), 0, at.max()
        options = {"window": None, "scale": 0.1, "softcap": None}
        with rows_alike():
            out = jax.jit(lambda *rows: reference(*rows, *pages, **options))(*rows)
        return np.asarray(out).reshape(T, K, group, h)

    np.testing.assert_array_equal(attend(1), attend(queries))
