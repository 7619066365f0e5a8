"""A layer's forward and backward pass as functions of their own, so that others may come between them.

The backward pass is cut in two without either doing the other's work: from its jaxpr, ``backward`` is what the gradient
of the input needs (and of small parameters, whose gradients cost nothing), ``weights`` the rest; what the rest reads of
the first is kept between them. Of a linear that is its output's cotangent, as zero-valued taps would give it (Qi et al.
2024 split by hand); for anything else it is whatever its derivative says, so a model need not know of it.

What the forward pass leaves for them is what depends on its input; values that the parameters or the context give
alone (the parameters themselves, or their casts) are taken from there again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval as pe

Tree = Any
INLINED = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"}


@dataclasses.dataclass(frozen=True)
class Passes:
    """A layer's passes, each traceable.

    forward(params, x, context) -> (y, aux, told, kept): y like x, kept a list of arrays.
    backward(params, context, kept, dy, daux) -> (dx, gradients of small parameters, saved).
    weights(params, context, kept, saved) -> gradients of the others. Gradients are flat lists: ``small`` says, leaf by
    leaf of the parameters, which are in the first. Without a split ``backward`` gives all, and nothing is saved.
    """

    forward: Callable[..., tuple[Any, Any, Tree, list[Any]]]
    backward: Callable[..., tuple[Any, list[Any], list[Any]]]
    weights: Callable[..., list[Any]]
    small: tuple[bool, ...]
    kept: tuple[jax.ShapeDtypeStruct, ...]
    saved: tuple[jax.ShapeDtypeStruct, ...]


def passes(layer: Callable[..., tuple[Any, Any, Tree]], params: Tree, x: Any, context: Tree, *, split: bool) -> Passes:
    """The passes of ``layer(params, x, context) -> (y, aux, told)`` for arguments like these, whose values do not
    matter.

    aux: a scalar whose gradient ``backward`` takes too. told: a tree of arrays that have none. Where it keeps less
    (``jax.checkpoint``), less is kept, and computed again in ``backward``.
    """
    trees: dict[str, Any] = {}

    def forward(params: Tree, x: Any, context: Tree) -> list[Any]:
        def apart(params: Tree, x: Any) -> tuple:
            y, aux, told = layer(params, x, context)
            return (y, aux), told

        found: Any = jax.vjp(apart, params, x, has_aux=True)
        (y, aux), pullback, told = found
        said, trees["told"] = jax.tree.flatten(told)
        leaves, trees["pullback"] = jax.tree.flatten(pullback)
        return [y, aux, *said, *leaves]

    arguments = params, x, context
    traced = _flat(forward, arguments)
    n_params, n_x, n_context = (len(jax.tree.leaves(each)) for each in arguments)
    of_params, of_x, of_context = _parts(traced.invars, (n_params, n_x, n_context))
    from_x = _reached(traced.eqns, of_x)
    results = 2 + trees["told"].num_leaves
    residuals = traced.outvars[results:]
    keep = [isinstance(v, core.Var) and v in from_x for v in residuals]
    kept = [v for v, mine in zip(residuals, keep, strict=True) if mine]
    given = [v for v, mine in zip(residuals, keep, strict=True) if not mine]

    def run_forward(params: Tree, x: Any, context: Tree) -> tuple[Any, Any, Tree, list[Any]]:
        env = traced.bind(jax.tree.leaves((params, x, context)))
        y, aux, *rest = traced.run(env, [*traced.outvars[:results], *kept])
        told = jax.tree.unflatten(trees["told"], rest[: results - 2])
        return y, aux, told, rest[results - 2 :]

    def pull(params: Tree, context: Tree, values: Sequence[Any], dy: Any, daux: Any) -> list[Any]:
        env = dict(zip([*of_params, *of_context], jax.tree.leaves((params, context)), strict=True)) | traced.constants
        again = iter(traced.run(env, given))
        mine = iter(values)
        leaves = [next(mine) if ours else next(again) for ours in keep]
        dparams, dx = jax.tree.unflatten(trees["pullback"], leaves)((dy, daux))
        return [dx, *jax.tree.leaves(dparams)]

    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in kept]
    y, aux = (traced.outvars[i].aval for i in (0, 1))
    back = _flat(pull, (params, context, [v.aval for v in kept], y, aux))
    small = tuple(not split or leaf.ndim < 2 for leaf in jax.tree.leaves(params))
    gradients = back.outvars[1:]
    first = [back.outvars[0], *(g for g, here in zip(gradients, small, strict=True) if here)]
    others = [g for g, here in zip(gradients, small, strict=True) if not here]
    back = dataclasses.replace(back, eqns=_halved(back.eqns, first, others))
    in_first = _needed(back.eqns, first)
    # What parameters and context give alone is computed again rather than kept, as for the forward pass.
    moving = _reached(back.eqns, back.invars[n_params + n_context :])
    in_second = [
        eqn
        for eqn in _needed(back.eqns, others)
        if not any(v in moving for v in eqn.outvars) or not any(eqn is each for each in in_first)
    ]
    made = {v for eqn in in_first for v in eqn.outvars if v in moving}
    made |= set(back.invars[n_params + n_context + len(kept) :])  # dy and daux are not there any more
    read = {v for eqn in in_second for v in eqn.invars if isinstance(v, core.Var)}
    saved = [v for v in dict.fromkeys([*_in_order(back, made)]) if v in read or any(v is g for g in others)]

    def run_backward(params: Tree, context: Tree, kept: Sequence[Any], dy: Any, daux: Any) -> tuple[Any, list, list]:
        env = back.bind(jax.tree.leaves((params, context, list(kept), dy, daux)))
        dx, *rest = back.run(env, [*first, *saved], in_first)
        return dx, rest[: len(first) - 1], rest[len(first) - 1 :]

    def run_weights(params: Tree, context: Tree, kept: Sequence[Any], saved_: Sequence[Any]) -> list[Any]:
        leaves = jax.tree.leaves((params, context, list(kept)))
        env = dict(zip(back.invars, leaves, strict=False)) | back.constants | dict(zip(saved, saved_, strict=True))
        return back.run(env, others, in_second)

    saved_shapes = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in saved)
    return Passes(run_forward, run_backward, run_weights, small, tuple(shapes), saved_shapes)


@dataclasses.dataclass(frozen=True)
class Flat:
    """Equations without calls inside them, in order."""

    invars: list[Any]
    outvars: list[Any]
    eqns: list[Any]
    constants: dict[Any, Any]

    def bind(self, values: Sequence[Any]) -> dict[Any, Any]:
        return dict(zip(self.invars, values, strict=True)) | self.constants

    def run(self, env: dict[Any, Any], wanted: Sequence[Any], eqns: Iterable[Any] | None = None) -> list[Any]:
        """The values of ``wanted``, by those equations that they need, of ``eqns``."""
        for eqn in _needed(self.eqns if eqns is None else list(eqns), wanted, set(env)):
            params = eqn.primitive.get_bind_params(eqn.params)
            functions, params = params if isinstance(params, tuple) else ((), params)  # functions apart before JAX 0.10
            values = [_value(env, v) for v in eqn.invars]
            with eqn.ctx.manager:
                out = eqn.primitive.bind(*functions, *values, **params)
            env.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))
        return [_value(env, v) for v in wanted]


def _flat(fn: Callable[..., list[Any]], arguments: tuple) -> Flat:
    closed = jax.make_jaxpr(fn)(*arguments)
    jaxpr, constants = closed.jaxpr, dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    names: dict[Any, Any] = {}
    eqns = list(_inlined(jaxpr.eqns, names, constants))
    return Flat(list(jaxpr.invars), [_named(v, names) for v in jaxpr.outvars], eqns, constants)


def _inlined(eqns: Iterable[Any], names: dict[Any, Any], constants: dict[Any, Any]) -> Iterable[Any]:
    """The equations with those of calls in their place, each variable of a call renamed to what it stands for."""
    for eqn in eqns:
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr") if eqn.primitive.name in INLINED else None
        invars = [_named(v, names) for v in eqn.invars]
        if inner is None:
            outvars = [_fresh(v, names) for v in eqn.outvars]
            yield eqn.replace(invars=invars, outvars=outvars)
            continue
        jaxpr = getattr(inner, "jaxpr", inner)
        within = dict(zip(jaxpr.invars, invars, strict=True))
        for v, value in zip(jaxpr.constvars, getattr(inner, "consts", ()), strict=True):
            within[v] = _fresh(v, {})
            constants[within[v]] = value
        yield from _inlined(jaxpr.eqns, within, constants)
        names.update(zip(eqn.outvars, (_named(v, within) for v in jaxpr.outvars), strict=True))


def _named(v: Any, names: dict[Any, Any]) -> Any:
    return names.get(v, v) if isinstance(v, core.Var) else v


def _fresh(v: Any, names: dict[Any, Any]) -> Any:
    """A variable of its own: the same call may be inlined twice."""
    names[v] = type(v)(v.aval)
    return names[v]


def _value(env: dict[Any, Any], v: Any) -> Any:
    return env[v] if isinstance(v, core.Var) else jnp.asarray(v.val)


def _parts(values: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    found, at = [], 0
    for count in counts:
        found.append(list(values[at : at + count]))
        at += count
    return found


def _reached(eqns: Iterable[Any], begin: Iterable[Any]) -> set[Any]:
    """The variables that depend on some."""
    found = set(begin)
    for eqn in eqns:
        if any(isinstance(v, core.Var) and v in found for v in eqn.invars):
            found.update(eqn.outvars)
    return found


def _needed(eqns: Sequence[Any], wanted: Iterable[Any], there: set[Any] | None = None) -> list[Any]:
    """The equations that some variables need, in order; those in ``there`` have their values."""
    there = there or set()
    live = {v for v in wanted if isinstance(v, core.Var) and v not in there}
    found = []
    for eqn in reversed(eqns):
        if any(v in live for v in eqn.outvars):
            found.append(eqn)
            live.update(v for v in eqn.invars if isinstance(v, core.Var) and v not in there)
    return found[::-1]


def _halved(eqns: Sequence[Any], first: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Equations that hold several products (a ``shard_map`` over experts, a scan), of which both ``first`` and
    ``others`` need results, other ones each: as two, with what either needs. Inside, some is then done twice."""
    live = [{v for v in wanted if isinstance(v, core.Var)} for wanted in (first, others)]
    found = []
    for eqn in reversed(eqns):
        used = [[v in each for v in eqn.outvars] for each in live]
        more = [second and not mine for mine, second in zip(*used, strict=True)]
        rule = pe.dce_rules.get(eqn.primitive)
        if rule is not None and any(used[0]) and any(more):
            for each, outs in ((live[1], more), (live[0], used[0])):
                _, half = rule(outs, eqn)
                assert half is not None  # some of its results are used
                each.update(v for v in half.invars if isinstance(v, core.Var))
                # A loop gives out its carry whoever wants it: under another name, as the other half has that one.
                asked = {v for v, used_ in zip(eqn.outvars, outs, strict=True) if used_}
                found.append(half.replace(outvars=[v if v in asked else type(v)(v.aval) for v in half.outvars]))
            continue
        for each, outs in zip(live, used, strict=True):
            if any(outs):
                each.update(v for v in eqn.invars if isinstance(v, core.Var))
        found.append(eqn)
    return found[::-1]


def _in_order(flat: Flat, some: set[Any]) -> list[Any]:
    every = [*flat.invars, *(v for eqn in flat.eqns for v in eqn.outvars)]
    return [v for v in every if v in some]
