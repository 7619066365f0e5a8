"""The one matmul of the models: ``linear``, its form chosen per platform, shape and dtype.

Kernels are stored output-major ([out..., in...]): the order of Hugging Face files, and on CPU the only
one whose forward, decode and input gradient are all fast. Figures behind each choice: docs/kernels.md.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

# XLA:CPU runs a bfloat16 dot of fewer rows than this at scalar speed: 2 GB/s of weights against 20.
CPU_BF16_MIN_ROWS = 4


def activation_dtype(compute_dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of activations between matmuls when kernels are in ``compute_dtype``.

    On CPU element-wise work in bfloat16 is slower than in float32 and a bfloat16 result of a dot costs
    a pass, so only the operands of matmuls are bfloat16 there.
    """
    if jax.default_backend() == "cpu" and compute_dtype == jnp.bfloat16:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(compute_dtype)


def linear(x: jax.Array, kernel: jax.Array, contract: int = 1) -> jax.Array:
    """``x`` [..., in...] times ``kernel`` [out..., in...] over the last ``contract`` dimensions: [..., out...].

    Operands are multiplied in the kernel's dtype, summed in at least float32, returned in x's dtype.
    """
    rows, inner = x.shape[: x.ndim - contract], x.shape[x.ndim - contract :]
    outer = kernel.shape[: kernel.ndim - contract]
    y = _dot(x.reshape(math.prod(rows), math.prod(inner)), kernel.reshape(math.prod(outer), math.prod(inner)))
    return y.reshape(*rows, *outer)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """[N, D] times [F, D] to [N, F] in x's dtype."""
    n = x.shape[0]
    a = x.astype(w.dtype)
    if jax.default_backend() == "cpu" and w.dtype == jnp.bfloat16 and n < CPU_BF16_MIN_ROWS:
        a = jnp.pad(a, ((0, CPU_BF16_MIN_ROWS - n), (0, 0)))
    accumulate = jnp.promote_types(w.dtype, jnp.float32)
    y = lax.dot_general(a, w, (((1,), (1,)), ((), ())), preferred_element_type=accumulate)
    return y[:n].astype(x.dtype)
