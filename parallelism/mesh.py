"""The device mesh: six named axes, always in this order, written as ``data=2,fsdp=-1,tensor=4``.

The axes run from the one that talks least to the one that talks most, so that the innermost ones
get the nearest devices:

========  ==================================================================================
data      whole replicas; gradients are summed once a step
fsdp      replicas that share parameters and optimizer state between them (ZeRO-3)
stage     consecutive layers (pipeline parallelism)
expert    experts of a mixture
context   tokens of one sequence
tensor    heads, feed-forward columns, vocabulary (Megatron)
========  ==================================================================================

``slices=2`` in the same string says that the devices are two slices (TPU slices, or hosts of GPUs)
joined by the slow data-centre network: the outermost part of ``data`` then runs over that network and
every other axis stays inside a slice.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from parallelism.errors import UserError, unknown_name

STAGE = "stage"
AXES = ("data", "fsdp", STAGE, "expert", "context", "tensor")
"""Mesh axis names, outermost first."""


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Sizes of the six mesh axes; at most one is -1, "the rest of the devices".

    slices: number of slices that the devices lie in; ``data`` must be a multiple of it.
    Raises UserError for a size that is not a positive whole number (or a single -1).
    """

    data: int = 1
    fsdp: int = 1
    stage: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            n = getattr(self, field.name)
            whole = isinstance(n, int) and not isinstance(n, bool)
            if not whole or (n < 1 and (n != -1 or field.name == "slices")):
                rest = "" if field.name == "slices" else " or -1 (the rest of the devices)"
                raise UserError(f"mesh: {field.name}={n}: expected a whole number of at least 1{rest}")
        if self.sizes.count(-1) > 1:
            raise UserError(
                f"mesh {str(self)!r}: -1 (the rest of the devices) is given to more than one axis: keep one"
            )
        if self.data != -1 and self.data % self.slices:
            raise UserError(
                f"mesh {str(self)!r}: data={self.data} is not a multiple of slices={self.slices}: "
                "slices are joined along the data axis, so make data a multiple of them"
            )

    @classmethod
    def parse(cls, text: str) -> MeshSpec:
        """``"data=2,fsdp=-1"`` -> MeshSpec; the empty string is one device."""
        sizes: dict[str, int] = {}
        for item in text.split(",") if text.strip() else ():
            match = re.fullmatch(r"\s*(\w+)\s*=\s*(-?[0-9]{1,9})\s*", item)
            if match is None:
                raise UserError(f"mesh {text!r}: found {item!r}, expected AXIS=NUMBER such as fsdp=4 or fsdp=-1")
            name, n = match[1], int(match[2])
            if name not in (*AXES, "slices"):
                raise unknown_name(f"axis in mesh {text!r}:", name, (*AXES, "slices"))
            if name in sizes:
                raise UserError(f"mesh {text!r}: {name} is given twice: keep one")
            sizes[name] = n
        return cls(**sizes)

    def __str__(self) -> str:
        """The canonical string, axes of size 1 left out: ``parse(str(spec)) == spec``."""
        named = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return ",".join(f"{name}={n}" for name, n in named if n != 1)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of ``AXES``."""
        return tuple(getattr(self, axis) for axis in AXES)

    def resolve(self, n_devices: int) -> MeshSpec:
        """This spec with -1 replaced, on ``n_devices`` devices.

        Raises UserError when it needs more devices than there are, or when the rest does not come out whole.
        """
        spec = self
        given = math.prod(n for n in self.sizes if n != -1)
        if -1 in self.sizes:
            axis = AXES[self.sizes.index(-1)]
            if n_devices >= given and n_devices % given:
                raise UserError(
                    f"mesh {str(self)!r}: {n_devices} devices do not divide by {given}, the product of the other axes: "
                    f"give {axis} a number or change the others"
                )
            spec = dataclasses.replace(self, **{axis: max(n_devices // given, 1)})
        need = math.prod(spec.sizes)
        if need > n_devices:
            raise UserError(
                f"mesh {str(self)!r} needs {need} devices, found {n_devices}: make an axis smaller or -1, or, to "
                f"try it on CPU, start with JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={need} in the environment"
            )
        return spec

    def build(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The ``jax.sharding.Mesh`` with all six axes (Auto), over ``devices`` (default: all of the process group's).

        A mesh smaller than ``devices`` takes the first ones. Neighbours on an inner axis are neighbours in the
        machine where the platform tells its topology (``jax.experimental.mesh_utils``).
        """
        available = list(jax.devices() if devices is None else devices)
        used = self.resolve(len(available))._arrange(available)
        if idle := {d.process_index for d in available} - {d.process_index for d in used.flat}:
            raise UserError(
                f"mesh {str(self)!r} takes {used.size} of {len(available)} devices and leaves process {min(idle)} "
                "without any: use every process's devices (an axis of -1 does) or start fewer processes"
            )
        return Mesh(used, AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def _arrange(self, devices: list[Any]) -> np.ndarray:
        """The devices of a resolved spec as an array of shape ``sizes``."""
        if self.slices == 1:
            return _one_slice(self.sizes, devices)
        slices = _slices(devices, self.slices)
        if len(slices) != self.slices:
            raise UserError(
                f"mesh {str(self)!r}: found devices of {len(slices)} slice(s), expected {self.slices}: "
                f"give slices={len(slices)}"
            )
        inner = (self.data // self.slices, *self.sizes[1:])
        if (n := math.prod(inner)) > (least := min(map(len, slices))):
            raise UserError(
                f"mesh {str(self)!r} needs {n} devices in each of {self.slices} slices, found a slice of {least}: "
                "make an axis smaller"
            )
        return np.concatenate([_one_slice(inner, members) for members in slices])


def _one_slice(sizes: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    n = math.prod(sizes)
    if n < len(devices):
        # Part of a slice need not be a torus, which is all that mesh_utils can arrange: keep the given order.
        return np.asarray(devices[:n], dtype=object).reshape(sizes)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _slices(devices: list[Any], n: int) -> list[list[Any]]:
    """The devices by slice, as the platform numbers them (TPU: slices; GPU: hosts).

    CPU devices have no slices: ``n`` equal runs of them stand in, so that the mesh of a multi-slice job can be
    tried without the hardware.
    """
    if devices[0].platform == "cpu" and len(devices) % n == 0:
        run = len(devices) // n
        return [devices[i : i + run] for i in range(0, len(devices), run)]
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    return [groups[k] for k in sorted(groups)]
