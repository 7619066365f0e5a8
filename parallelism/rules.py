"""Logical axis names -> mesh axes: one table for parameters, one for activations.

A model names the dimensions of its arrays (``embed``, ``heads``, ``act_mlp``); a table decides over which mesh
axes each name is split, and what happens to a dimension that does not divide by them. The defaults are
fully sharded data parallelism over ``fsdp`` together with Megatron's tensor parallelism (Shoeybi et al. 2019,
section 3): column-parallel first and row-parallel second projections, a vocabulary-parallel embedding.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, cast, get_args

from parallelism.errors import UserError, unknown_name
from parallelism.mesh import AXES

Action = Literal["error", "replicate", "pad"]
ACTIONS: tuple[Action, ...] = get_args(Action)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where one logical axis goes.

    mesh_axes: mesh axes that split it, outermost first; empty keeps it whole.
    indivisible: what is done with a dimension that does not divide by the product of their sizes:
      ``error`` raises UserError, ``replicate`` keeps it whole on every device, ``pad`` appends zeros to it.
    """

    mesh_axes: tuple[str, ...] = ()
    indivisible: Action = "error"

    def __str__(self) -> str:
        return f"{'+'.join(self.mesh_axes) or 'none'}:{self.indivisible}"


class Rules(Mapping[str, Rule]):
    """An immutable table of rules by logical axis name.

    name: what the table is of, for messages.
    paddable: the axes that may be padded: those for which zeros at the end change no result.
    Raises UserError for an unknown mesh axis or action, and for padding where it would change results.

    A model with axis names of its own makes its own table:
    ``Rules("parameters", {**PARAMETERS, "state": Rule(("tensor",))}, paddable=PARAMETERS.paddable)``.
    """

    def __init__(self, name: str, rules: Mapping[str, Rule], paddable: Iterable[str] = ()):
        self.name = name
        self.paddable = frozenset(paddable)
        self._rules = dict(rules)
        for axis, rule in self._rules.items():
            for mesh_axis in rule.mesh_axes:
                if mesh_axis not in AXES:
                    raise unknown_name(f"mesh axis in the {name} rule for {axis!r}:", mesh_axis, AXES)
            if len(set(rule.mesh_axes)) < len(rule.mesh_axes):
                raise UserError(f"{name} rule {axis}={rule}: a mesh axis is named twice: keep one")
            if rule.indivisible not in ACTIONS:
                raise unknown_name(f"action in the {name} rule for {axis!r}:", rule.indivisible, ACTIONS)
            if rule.indivisible == "pad" and axis not in self.paddable:
                can = ", ".join(sorted(self.paddable)) or "none"
                raise UserError(
                    f"{name} rule {axis}={rule}: padding {axis!r} would change results (can be padded: {can}): "
                    "use error or replicate"
                )
        heads, kv_heads = self._rules.get("heads"), self._rules.get("kv_heads")
        if heads != kv_heads and "pad" in {r.indivisible for r in (heads, kv_heads) if r}:
            # Padded apart, a query head would be given to another key/value head.
            raise UserError(
                f"{name} rules heads={heads} and kv_heads={kv_heads}: they must be the same where either is padded: "
                "give both"
            )

    def __getitem__(self, axis: str) -> Rule:
        return self._rules[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rules):
            return NotImplemented
        return (self._rules, self.paddable) == (other._rules, other.paddable)

    def __hash__(self) -> int:
        return hash((frozenset(self._rules.items()), self.paddable))

    def __str__(self) -> str:
        """Every rule, as ``override`` reads them."""
        return ",".join(f"{axis}={rule}" for axis, rule in self.items())

    def replace(self, **rules: str | Rule) -> Rules:
        """A table with some rules changed: ``replace(heads="tensor:replicate", vocab="tensor+context")``.

        A string is ``MESH_AXIS+MESH_AXIS:ACTION``; ``none`` stands for no mesh axis; the half that is left out keeps
        its value. Raises UserError for a logical axis that the table does not have, and what ``Rules`` raises.
        """
        changed = dict(self._rules)
        for axis, rule in rules.items():
            if axis not in self._rules:
                raise unknown_name(f"logical axis in the {self.name} rules:", axis, self._rules)
            changed[axis] = rule if isinstance(rule, Rule) else self._parse(axis, rule)
        return Rules(self.name, changed, self.paddable)

    def override(self, text: str) -> Rules:
        """``replace`` from one string, as a command line gives it: ``"heads=tensor:pad,vocab=tensor+context"``."""
        rules: dict[str, str] = {}
        for item in text.split(",") if text.strip() else ():
            axis, equals, rule = (s.strip() for s in item.partition("="))
            if not equals or not axis:
                raise UserError(f"{self.name} rules {text!r}: found {item!r}, expected LOGICAL=MESH_AXIS:ACTION")
            if axis in rules:
                raise UserError(f"{self.name} rules {text!r}: {axis} is given twice: keep one")
            rules[axis] = rule
        return self.replace(**rules)

    def _parse(self, axis: str, text: str) -> Rule:
        match = re.fullmatch(r"([\w+]*)(?::(\w+))?", text.replace(" ", ""))
        if match is None or match[0] == "":
            raise UserError(
                f"{self.name} rule {axis}={text!r}: expected mesh axes and an action such as tensor+fsdp:replicate"
            )
        rule = self._rules[axis]
        if match[1]:
            rule = dataclasses.replace(rule, mesh_axes=() if match[1] == "none" else tuple(match[1].split("+")))
        if match[2]:
            rule = dataclasses.replace(rule, indivisible=cast(Action, match[2]))
        return rule

    def rules_of(self, array: str, axes: tuple[str | None, ...]) -> tuple[Rule, ...]:
        """One rule a dimension of an array whose dimensions are named ``axes`` (None: kept whole).

        array: its name, for messages. Raises UserError for a name that the table does not have and for two
        dimensions that want the same mesh axis.
        """
        found: list[Rule] = []
        taken: dict[str, str] = {}
        for axis in axes:
            if axis is not None and axis not in self._rules:
                raise unknown_name(f"logical axis of {array} in the {self.name} rules:", axis, self._rules)
            rule = Rule() if axis is None else self._rules[axis]
            for mesh_axis in rule.mesh_axes:
                if mesh_axis in taken:
                    raise UserError(
                        f"{array} {axes}: the {self.name} rules split both {taken[mesh_axis]!r} and {axis!r} over the "
                        f"mesh axis {mesh_axis!r}: change the rule of one of them"
                    )
                taken[mesh_axis] = str(axis)
            found.append(rule)
        return tuple(found)


PARAMETERS = Rules(
    "parameters",
    {
        "embed": Rule(("fsdp", "expert")),
        "vocab": Rule(("tensor",), "pad"),
        "heads": Rule(("tensor",), "pad"),
        "kv_heads": Rule(("tensor",), "pad"),
        "head_dim": Rule(),
        "mlp": Rule(("tensor",), "pad"),
        "router": Rule(),
        "experts": Rule(("expert",)),
        "expert_embed": Rule(("fsdp",)),
        "expert_mlp": Rule(("tensor",), "pad"),
        "norm": Rule(),
        "layers": Rule(),
    },
    paddable=("vocab", "heads", "kv_heads", "mlp", "expert_mlp"),
)
"""Parameters, and the optimizer state that has their shapes.

Zero weights for a head or a feed-forward column add nothing to the output and get no gradient; a padded
vocabulary adds logits, which the model masks.
"""

ACTIVATIONS = Rules(
    "activations",
    {
        "batch": Rule(("data", "fsdp", "expert"), "replicate"),
        "replica": Rule(("data", "fsdp", "expert"), "replicate"),
        "seq": Rule(("context",), "replicate"),
        "residual": Rule(("context", "tensor"), "replicate"),
        "act_embed": Rule(),
        "act_heads": Rule(("tensor",), "replicate"),
        "act_kv_heads": Rule(("tensor",), "replicate"),
        "act_mlp": Rule(("tensor",), "replicate"),
        "act_vocab": Rule(("tensor",), "replicate"),
        "act_experts": Rule(("expert",), "replicate"),
        "act_expert_embed": Rule(("fsdp",), "replicate"),
        "head_dim": Rule(),
        "pages": Rule(),
        "layers": Rule(),
    },
)
"""Activations, and the key/value pool.

``batch`` counts rows of a training batch, ``replica`` the independent servers that a decode batch and its pool
are made of; ``pages`` are local to a replica, so they stay together.
"""
