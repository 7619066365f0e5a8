"""Named hardware: what its vendor says it can do, for utilisation figures and ahead-of-time compilation.

All figures are of one JAX device (which on TPU7x is half a chip). Sources:
- v4, v5e, v5p, v6e, tpu7x: Google Cloud TPU documentation, pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x",
  tables of chip specifications;
- h100, h200: "NVIDIA H100 Tensor Core GPU Architecture" white paper (SXM5), "NVIDIA H200 Tensor Core GPU" data sheet;
- a100: "NVIDIA A100 Tensor Core GPU" data sheet (SXM4, 80 GB).
Vendors state both directions of a link together, or with structured sparsity: halved here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from parallelism.errors import unknown_name


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of device. None, or a dtype that is missing, means that no figure is published.

    device_kinds: the ``jax.Device.device_kind`` values of it.
    peak_flops: dense operations/s by dtype name (a multiply-add is two); ``tensorfloat32`` is what float32 matmuls use
      on NVIDIA GPUs unless a higher precision is asked for.
    memory_bytes; memory_bandwidth: bytes/s; interconnect_bandwidth: bytes/s that one device can send to its
    neighbours, over all its links.
    topologies: names for ``jax.experimental.topologies.get_topology_desc`` (TPU only).
    """

    name: str
    platform: str
    device_kinds: tuple[str, ...]
    peak_flops: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    memory_bytes: int | None = None
    memory_bandwidth: float | None = None
    interconnect_bandwidth: float | None = None
    topologies: tuple[str, ...] = ()

    def peak(self, dtype: Any) -> float | None:
        """Dense operations/s with operands of ``dtype`` (a dtype, or a name in ``peak_flops``); None if unknown."""
        return self.peak_flops.get(dtype if isinstance(dtype, str) else np.dtype(dtype).name)


_GIB = 2**30

_HOPPER = {
    "float64": 66.9e12,
    "float32": 66.9e12,
    "tensorfloat32": 494.7e12,
    "bfloat16": 989.4e12,
    "float16": 989.4e12,
    "float8_e4m3fn": 1978.9e12,
    "float8_e5m2": 1978.9e12,
    "int8": 1978.9e12,
}

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        t.name: t
        for t in (
            Target("cpu", "cpu", ("cpu",)),
            Target(
                "v4",
                "tpu",
                ("TPU v4",),
                {"bfloat16": 275e12, "int8": 275e12},
                memory_bytes=32 * _GIB,
                memory_bandwidth=1200e9,
                interconnect_bandwidth=300e9,
                topologies=("v4:4x4x4",),
            ),
            Target(
                "v5e",
                "tpu",
                ("TPU v5 lite", "TPU v5e"),
                {"bfloat16": 197e12, "int8": 393e12},
                memory_bytes=16 * _GIB,
                memory_bandwidth=819e9,
                interconnect_bandwidth=200e9,
                topologies=("v5e:2x2", "v5e:4x4", "v5e:8x16", "v5e:16x16"),
            ),
            Target(
                "v5p",
                "tpu",
                ("TPU v5", "TPU v5p"),
                {"bfloat16": 459e12, "int8": 918e12},
                memory_bytes=95 * _GIB,
                memory_bandwidth=2765e9,
                interconnect_bandwidth=600e9,
                topologies=("v5p:2x2x1", "v5p:4x4x4", "v5p:8x8x8"),
            ),
            Target(
                "v6e",
                "tpu",
                ("TPU v6 lite", "TPU v6e"),
                {"bfloat16": 918e12, "int8": 1836e12},
                memory_bytes=32 * _GIB,
                memory_bandwidth=1638e9,
                interconnect_bandwidth=400e9,
                topologies=("v6e:4x4", "v6e:16x16"),
            ),
            # Two devices a chip: 2307 (bf16) and 4614 (fp8) TFLOP/s, 192 GiB, 7380 GB/s, 1200 GB/s both ways a chip.
            Target(
                "tpu7x",
                "tpu",
                ("TPU7x",),
                {"bfloat16": 2307e12 / 2, "float8_e4m3fn": 4614e12 / 2, "float8_e5m2": 4614e12 / 2},
                memory_bytes=96 * _GIB,
                memory_bandwidth=7380e9 / 2,
                interconnect_bandwidth=300e9,
                topologies=("tpu7x:4x4x4",),
            ),
            Target(
                "a100",
                "cuda",
                ("NVIDIA A100-SXM4-80GB",),
                {
                    "float64": 19.5e12,
                    "float32": 19.5e12,
                    "tensorfloat32": 156e12,
                    "bfloat16": 312e12,
                    "float16": 312e12,
                    "int8": 624e12,
                },
                memory_bytes=80 * 10**9,
                memory_bandwidth=2039e9,
                interconnect_bandwidth=300e9,
            ),
            Target(
                "h100",
                "cuda",
                ("NVIDIA H100 80GB HBM3",),
                _HOPPER,
                memory_bytes=80 * 10**9,
                memory_bandwidth=3350e9,
                interconnect_bandwidth=450e9,
            ),
            Target(
                "h200",
                "cuda",
                ("NVIDIA H200",),
                _HOPPER,
                memory_bytes=141 * 10**9,
                memory_bandwidth=4800e9,
                interconnect_bandwidth=450e9,
            ),
        )
    }
)
"""Every known target by name."""


def target(name: str) -> Target:
    """The target of this name; UserError with the nearest names if there is none."""
    try:
        return TARGETS[name]
    except KeyError:
        raise unknown_name("target", name, TARGETS) from None


def detect(device: Any) -> Target | None:
    """The target that a ``jax.Device`` is, by its ``device_kind``; None for a kind that is not known here."""
    return next((t for t in TARGETS.values() if device.device_kind in t.device_kinds), None)
