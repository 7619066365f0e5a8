"""ZeRO by rules: where parameters, their gradients and their optimizer state lie (Rajbhandari et al. 2020, section 5).

By one table of rules they lie alike, which over ``fsdp`` is ZeRO-3. Parameters that are whole on every device of
``fsdp`` make it ZeRO-2, gradients that are whole too ZeRO-1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jax.sharding import NamedSharding

from parallelism.errors import UserError
from parallelism.rules import Rules
from parallelism.sharding import Plan, plan

Shardings = Mapping[str, NamedSharding]


@dataclasses.dataclass(frozen=True)
class StateShardings:
    """Where the arrays of each parameter lie, by its key: itself, its summed gradient, its optimizer state."""

    parameters: Shardings
    gradients: Shardings
    optimizer: Shardings


@dataclasses.dataclass(frozen=True)
class StatePlans:
    """The plans of parameters, gradients and optimizer state, all of the parameters' layout."""

    parameters: Plan
    gradients: Plan
    optimizer: Plan

    @property
    def shardings(self) -> StateShardings:
        return StateShardings(self.parameters.shardings, self.gradients.shardings, self.optimizer.shardings)


def state_plans(
    parameters: Plan, gradients: Rules, optimizer: Rules, units: Mapping[str, int] | None = None
) -> StatePlans:
    """All three from the plan of the parameters and the rules of the others; units: as for ``plan``.

    Raises UserError where the rules pad an array differently: the three have one shape.
    """
    found = []
    for what, rules in (("gradient", gradients), ("optimizer", optimizer)):
        other = plan(parameters.layout, parameters.mesh, rules, units)
        for key, stored in parameters.layout.items():
            if other.layout[key].shape != stored.shape:
                raise UserError(
                    f"{key}: the parameter rules store it as {stored.shape}, the {what} rules as "
                    f"{other.layout[key].shape}: change only axes that need no padding (such as embed)"
                )
        found.append(other)
    return StatePlans(parameters, *found)
