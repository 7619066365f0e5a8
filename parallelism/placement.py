"""Which of a training step's arrays live in host memory, and proof that what was asked to move moves.

After ZeRO-Infinity (Rajbhandari et al. 2021, section 5): optimizer state, parameters and activations, each by rule.
Deep Optimizer States (Maurya et al. 2024) leaves every so many-th part of the state on the device, so that its update
hides the transfers of the others: the share. How the arrays travel is in ``parallelism/streaming.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from parallelism.errors import UserError, unknown_name
from parallelism.layout import Stored
from parallelism.streaming import HOST

KINDS = ("optimizer", "parameters", "activations")


@dataclasses.dataclass(frozen=True)
class Offload:
    """What lives in host memory.

    optimizer: the share, by bytes, of the optimizer's state of matrices. parameters: the kernels of the layers.
    activations: names of what a layer keeps for its backward pass (``jax.ad_checkpoint.checkpoint_name``).
    """

    optimizer: float = 0.0
    parameters: bool = False
    activations: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Offload:
        """From ``optimizer=0.5,parameters,activations=residual+attention``; ``optimizer`` alone is all of it.

        Raises UserError for a kind that does not exist or is given twice and for a value that it cannot have.
        """
        found: dict[str, Any] = {}
        for item in text.split(",") if text.strip() else ():
            name, equals, value = (part.strip() for part in item.partition("="))
            if name not in KINDS:
                raise unknown_name("kind of array to offload", name, KINDS)
            if name in found:
                raise UserError(f"offload {text!r}: {name} is given twice: keep one")
            if name == "optimizer":
                found[name] = _share(text, value) if equals else 1.0
            elif name == "parameters":
                if equals:
                    raise UserError(f"offload {text!r}: found {item.strip()!r}, expected parameters without a value")
                found[name] = True
            else:
                names = tuple(part.strip() for part in value.split("+"))
                if not all(names) or len(set(names)) < len(names):
                    raise UserError(
                        f"offload {text!r}: found {item.strip()!r}, expected activations=NAME+NAME, each once"
                    )
                found[name] = names
        return cls(**found)


def _share(text: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise UserError(
            f"offload {text!r}: found optimizer={value}, expected a share above 0 and at most 1, such as optimizer=0.5"
        )
    return share


# ------------------------------------------------------------------------------------------------- where arrays are put


def is_matrix(stored: Stored) -> bool:
    """Whether an array is worth a transfer: norms and biases are small, and needed at once."""
    return len(stored.parts[0].shape) > 1


def spread(sizes: Mapping[str, int], share: float) -> list[str]:
    """Keys, in order, that hold about ``share`` of all bytes, spread evenly among the others.

    Every so many-th one, where they are of one size. Off by half of the largest size at most.
    """
    chosen, due = [], 0.0
    for key, size in sizes.items():
        due += share * size
        if due > 0 and due >= size / 2:
            chosen.append(key)
            due -= size
    return chosen


def offloaded_state(layout: Mapping[str, Stored], owners: Mapping[str, str | None], share: float) -> list[str]:
    """Names of optimizer state that goes to the host: all that belongs to some of the parameters.

    layout: of the state. owners: the parameter whose shape and sharding each has, or None.
    Raises UserError where there is nothing to move.
    """
    sizes: Counter[str] = Counter()
    for name, owner in owners.items():
        if owner is not None and is_matrix(layout[name]):
            sizes[owner] += layout[name].nbytes
    if not sizes:
        raise UserError(
            "offload optimizer: this optimizer keeps nothing of a matrix's size, so nothing would move: leave it "
            "out, or use adamw"
        )
    chosen = set(spread(sizes, share))
    if not chosen:
        raise UserError(
            f"offload optimizer={share:g}: the states of {len(sizes)} parameters are larger shares each: increase it"
        )
    return [name for name, owner in owners.items() if owner in chosen and is_matrix(layout[name])]


def hosted(shardings: Mapping[str, NamedSharding], keys: Collection[str]) -> dict[str, NamedSharding]:
    """``shardings`` with those of ``keys`` in host memory."""
    return {k: _hosted(s) if k in keys else s for k, s in shardings.items()}


class _Hosted(NamedSharding):
    """In the host memory of devices that do not tell their memories.

    Those of a GPU that is compiled for ahead of time do not, and there NamedSharding drops the kind without a word.
    """

    @property
    def memory_kind(self) -> str:
        return HOST

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hosted) and NamedSharding.__eq__(self, other)

    def __hash__(self) -> int:
        return hash((_Hosted, NamedSharding.__hash__(self)))


def _hosted(sharding: NamedSharding) -> NamedSharding:
    found = sharding.with_memory_kind(HOST)
    return found if found.memory_kind == HOST else _Hosted(sharding.mesh, sharding.spec)


def of_result(sharding: NamedSharding) -> NamedSharding:
    """The sharding of a compiled function's result that is to lie as an argument does: where devices do not tell their
    memories the compiled program does not either, and the memory is that which the function leaves the value in."""
    return NamedSharding(sharding.mesh, sharding.spec) if isinstance(sharding, _Hosted) else sharding


# ------------------------------------------------------------------------------------------------------------ the proof


@dataclasses.dataclass(frozen=True)
class Moves:
    """What a traced program moves between memories; bytes are of whole arrays, a scan counts each time round.

    to_host, to_device: bytes. named: bytes to the host by activation name. names: all activation names in it.
    """

    to_host: int
    to_device: int
    named: Mapping[str, int]
    names: frozenset[str]


def moves(jaxpr: Any) -> Moves:
    """Read off a (closed) jaxpr and all inside it."""
    to_host = to_device = 0
    named: Counter[str] = Counter()
    names: set[str] = set()
    for inner, times in _walk(getattr(jaxpr, "jaxpr", jaxpr), 1):
        name_of: dict[Any, str] = {}
        for each in inner.eqns:
            if each.primitive.name == "name":
                names.add(each.params["name"])
                name_of[each.outvars[0]] = each.params["name"]
            if each.primitive.name != "device_put":
                continue
            for x, y in zip(each.invars, each.outvars, strict=True):
                size = times * math.prod(y.aval.shape) * y.aval.dtype.itemsize
                before, after = (v.aval.memory_space == jax.memory.Space.Host for v in (x, y))
                to_device += size if before and not after else 0
                if after and not before:
                    to_host += size
                    if not hasattr(x, "val") and x in name_of:  # a literal has a value, and cannot be hashed
                        named[name_of[x]] += size
    return Moves(to_host, to_device, dict(named), frozenset(names))


def _walk(jaxpr: Any, times: int) -> Iterator[tuple[Any, int]]:
    yield jaxpr, times
    for each in jaxpr.eqns:
        more = times * each.params["length"] if each.primitive.name == "scan" else times
        for value in each.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _walk(inner, more)


@dataclasses.dataclass(frozen=True)
class Program:
    """What there is to judge a compiled step by.

    arguments: bytes of its arguments in host memory, on one device. host_argument_bytes, host_temporary_bytes: what
    the compiler says; None where it has but one memory (CPU).
    """

    name: str
    moves: Moves
    arguments: int
    host_argument_bytes: int | None
    host_temporary_bytes: int | None


def host_bytes(arguments: Any) -> int:
    """Bytes in host memory that belong to one device, of arrays or ShapeDtypeStructs."""
    found = 0
    for x in jax.tree.leaves(arguments):
        sharding = getattr(x, "sharding", None)
        if sharding is not None and sharding.memory_kind == HOST:
            found += math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return found


def check(offload: Offload, programs: Iterable[Program]) -> None:
    """Raises UserError unless the programs of a step move what was asked for: a compiler that does not says nothing.

    A misspelt name, a name whose value no backward pass needs, an array that the compiler brought back.
    """
    programs = list(programs)
    names = {name for p in programs for name in p.moves.names}
    for name in offload.activations:
        if name not in names:
            raise unknown_name("activation to offload", name, names)
        if not any(p.moves.named.get(name) for p in programs):
            raise UserError(
                f"offload activations={name}: nothing moves, as no backward pass reads it from memory; names in the "
                f"program: {', '.join(sorted(names))}: leave it out"
            )
    kinds = [kind for kind, asked in (("optimizer", offload.optimizer), ("parameters", offload.parameters)) if asked]
    if kinds and not any(p.moves.to_device for p in programs):
        raise UserError(f"offload {','.join(kinds)}: no program of the step brings anything from host memory")
    for p in programs:
        if p.host_argument_bytes is not None and p.host_argument_bytes < p.arguments:
            raise UserError(
                f"offload {','.join(kinds)}: {p.arguments} bytes of the arguments of {p.name} should be in host memory "
                f"and {p.host_argument_bytes} are in the compiled program: this back end cannot do it, leave it out"
            )
        if p.host_temporary_bytes == 0 and any(p.moves.named.values()):
            raise UserError(
                f"offload activations={'+'.join(offload.activations)}: the compiled program {p.name} keeps them all in "
                f"device memory; names in the program: {', '.join(sorted(names))}: leave it out"
            )
