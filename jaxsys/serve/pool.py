"""The pool of keys and values: how large a page is, and the array itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.kernels.matmul import activation_dtype
from jaxsys.kernels.paged import PAGES, Pool, heads_side_by_side
from jaxsys.kernels.paged_tpu import SUBLANES
from jaxsys.models.state import Model
from parallelism.errors import UserError
from parallelism.sharding import axes_of, constrain, current, platform, spec_of


def make_pool(model: Model, replicas: int, pages: int, page_size: int, dtype: np.dtype) -> Callable[[], Pool]:
    """Traceable: an empty pool, so many pages a replica; see ``pool_dtype``.

    Raises UserError, traced for TPU, for a page size that is not a multiple of 8.
    """
    L, K, h = model.config.n_layers, kv_heads(model), model.config.head_dim

    def pool() -> Pool:
        if platform() == "tpu" and page_size % SUBLANES:
            raise UserError(
                f"page_size {page_size}: expected a multiple of {SUBLANES} on TPU, as memory is laid out there"
            )
        together, width = heads_side_by_side(_of_a_device(K), h)
        zeros = jnp.zeros((replicas, L, pages, K // together, page_size, width), dtype)
        k, v = (constrain(zeros, PAGES) for _ in range(2))
        tokens = jnp.zeros((replicas, 1, pages, page_size), jnp.int32)
        return Pool(k, v, constrain(tokens, ("replica", None, "pages", None)))

    return pool


def page_bytes(model: Model, page_size: int, dtype: np.dtype) -> int:
    """Bytes that one page of the pool holds, over all layers and devices."""
    c = model.config
    return page_size * (2 * c.n_layers * kv_heads(model) * c.head_dim * dtype.itemsize + 4)


def least_bytes(model: Model, replicas: int, positions: int, page_size: int, dtype: np.dtype) -> int:
    """Of the smallest pool that holds a sequence of so many positions on every replica."""
    return replicas * (-(-positions // page_size) + 1) * page_bytes(model, page_size, dtype)


def pool_dtype(params: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> np.dtype:
    """Keys and values are kept as activations are; bfloat16 kernels on CPU: float32, which is what it is fast in."""
    return np.dtype(activation_dtype(params["embed.kernel"].dtype))


def kv_heads(model: Model) -> int:
    """Key/value heads as stored: the layout may pad them."""
    key = next(key for key in model.layout if key.endswith("attention.k.kernel"))
    return model.layout[key].shape[model.layout[key].axes.index("kv_heads")]


def _of_a_device(heads: int) -> int:
    """How many of the key/value heads lie on one device."""
    context = current()
    if context is None:
        return heads
    return heads // math.prod(context.mesh.shape[axis] for axis in axes_of(spec_of((heads,), ("act_kv_heads",))))
