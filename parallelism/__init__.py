"""Where arrays live: the mesh, logical axes, the logical layout, sharding. See docs/parallelism.md."""

from parallelism.errors import UserError
from parallelism.layout import Layout, Logical, Region, Stored
from parallelism.mesh import AXES, MeshSpec
from parallelism.rules import ACTIVATIONS, PARAMETERS, Rule, Rules
from parallelism.sharding import (
    Decision,
    Plan,
    ShardingContext,
    constrain,
    create,
    current,
    plan,
    platform,
    put,
    refuse_idle_axes,
    sharding_context,
    to_host,
)
from parallelism.sharding_report import Report, report
from parallelism.targets import TARGETS, Target, detect, target

__all__ = [
    "ACTIVATIONS",
    "AXES",
    "PARAMETERS",
    "TARGETS",
    "Decision",
    "Layout",
    "Logical",
    "MeshSpec",
    "Plan",
    "Region",
    "Report",
    "Rule",
    "Rules",
    "ShardingContext",
    "Stored",
    "Target",
    "UserError",
    "constrain",
    "create",
    "current",
    "detect",
    "plan",
    "platform",
    "put",
    "refuse_idle_axes",
    "report",
    "sharding_context",
    "target",
    "to_host",
]
