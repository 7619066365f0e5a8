"""Collectives read off compiled programs whose traffic is known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallelism import MeshSpec
from parallelism.collectives import collectives, summary
from parallelism.hlo import Program

MESH = "data=2,fsdp=2,tensor=2"


def compiled(local, mesh, specs, *shapes):
    """The text of ``local`` under shard_map for float32 arrays of these global shapes."""
    fn = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    arrays = [
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, p))
        for s, p in zip(shapes, specs, strict=True)
    ]
    return jax.jit(fn).lower(*arrays).compile().as_text()


def read(local, spec, shape=(8, 16), mesh=MESH):
    built = MeshSpec.parse(mesh).build()
    return [
        (c.kind, c.axes, c.count, c.nbytes, c.sent) for c in collectives(compiled(local, built, (spec,), shape), built)
    ]


def ring(x, axis, steps):
    return lax.fori_loop(0, steps, lambda _, y: lax.ppermute(y, axis, [(0, 1), (1, 0)]) + 1, x)


CASES = {
    # A shard of 8 x 16 float32 over one axis of 2 is 256 bytes.
    "an all-reduce": (lambda x: lax.psum(x, "tensor"), P("tensor"), ("all-reduce", ("tensor",), 1, 256, 256)),
    "one over two axes": (
        lambda x: lax.psum(x, ("data", "tensor")), P(("data", "tensor")),
        ("all-reduce", ("data", "tensor"), 1, 128, 192),
    ),
    "a reduce-scatter": (
        lambda x: jnp.tile(lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True), (2, 1)), P("fsdp"),
        ("reduce-scatter", ("fsdp",), 1, 256, 128),
    ),
    "an all-gather": (
        lambda x: lax.all_gather(x, "fsdp", tiled=True)[:4], P("fsdp"), ("all-gather", ("fsdp",), 1, 256, 256)
    ),
    "an all-to-all": (
        lambda x: lax.all_to_all(x, "tensor", 1, 0, tiled=True).reshape(x.shape), P("tensor"),
        ("all-to-all", ("tensor",), 1, 256, 128),
    ),
    "a ring of five steps": (
        partial(ring, axis="data", steps=5), P("data"), ("collective-permute", ("data",), 5, 256, 1280)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_kind_axes_runs_and_bytes_of(case):
    local, spec, expected = CASES[case]
    assert read(local, spec) == [expected]


def test_loops_in_loops_multiply():
    def local(x):
        return lax.fori_loop(0, 3, lambda _, y: ring(y, "data", 4), x)

    ((kind, axes, count, nbytes, sent),) = read(local, P("data"))
    assert (kind, axes, count, sent) == ("collective-permute", ("data",), 12, 12 * nbytes)


def test_an_axis_of_one_device_sends_nothing():
    assert read(lambda x: lax.psum(x, ("stage", "expert")), P("data")) == []


def test_the_line_of_python_is_named():
    built = MeshSpec.parse(MESH).build()
    text = compiled(lambda x: lax.psum(x, "tensor"), built, (P("tensor"),), (8, 16))
    (found,) = collectives(text, built)
    assert "test_collectives.py" in found.source or "psum" in found.source


FORMS = {
    "listed": "replica_groups={{0,2},{1,3},{4,6},{5,7}}",
    "iota": "replica_groups=[4,2]<=[2,2,2]T(0,2,1)",
    "named": "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}",
    "named, in another order": "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,2,2]T(0,2,1)) {'c'}",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_way_of_writing_groups_is_read(form):
    text = f"""HloModule m

ENTRY %main (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0:T(128)}} parameter(0)
  ROOT %r = f32[4]{{0:T(128)}} all-reduce(%p), channel_id=1, {FORMS[form]}, to_apply=%add
}}
"""
    (found,) = collectives(text, MeshSpec.parse(MESH).build())
    assert (found.kind, found.axes, found.nbytes, found.sent) == ("all-reduce", ("fsdp",), 16, 16.0)


def test_groups_in_an_unknown_form_are_not_guessed():
    text = """HloModule m

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %r = f32[4]{0} all-reduce(%p), replica_groups=<every second>, to_apply=%add
}
"""
    with pytest.raises(ValueError, match="every second"):
        collectives(text, MeshSpec.parse(MESH).build())


def test_a_loop_without_a_known_count_has_it_in_its_condition():
    text = """HloModule m

%cond (s: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7), metadata={op_name="x"}
  %s = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]) parameter(0)
  %x = f32[4] get-tuple-element(%s), index=1
  %send = f32[4] collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]) parameter(0)
  ROOT %w = (s32[], f32[4]) while(%s), condition=%cond, body=%body
}
"""
    (found,) = collectives(text, MeshSpec.parse(MESH).build())
    assert (found.kind, found.axes, found.count, found.sent, found.asynchronous) == (
        "collective-permute", ("tensor",), 7, 112.0, False,
    )  # fmt: skip
    assert summary([found]) == {("collective-permute", ("tensor",)): (7, 112.0)}


@pytest.mark.parametrize(("between", "hidden"), [("  %y = f32[4] fusion(%x), kind=kLoop, calls=%f", True), ("", False)])
@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute-done(%send)"),
        ("async-start(%x), calls=%wrapped", "async-done(%send)"),
    ],
)
def test_a_collective_is_asynchronous_if_something_is_computed_until_it_ends(start, end, between, hidden):
    text = f"""HloModule m

%wrapped (x: f32[4]) -> f32[4] {{
  %x = f32[4] parameter(0)
  ROOT %p = f32[4] collective-permute(%x), source_target_pairs={{{{0,1}},{{1,0}}}}, x={{async_collective_name="p"}}
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4] parameter(0)
  %send = f32[4] {start}
{between}
  ROOT %end = f32[4] {end}
}}
"""
    (found,) = collectives(text, MeshSpec.parse(MESH).build())
    assert (found.kind, found.asynchronous, found.sent) == ("collective-permute", hidden, 16.0)


def test_a_collective_that_the_tpu_compiler_moves_on_in_several_fusions_counts_once():
    gather = "all-gather(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}"
    text = f"""HloModule m

%fused.1 (x: f32[4]) -> (f32[4], f32[8]) {{
  %x = f32[4] parameter(0)
  %g = f32[8] {gather}
  ROOT %c = (f32[4], f32[8]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.2 (x: f32[4]) -> f32[8] {{
  %x = f32[4] parameter(0)
  ROOT %g = f32[8] {gather}
}}

%fused.3 (x: f32[4]) -> f32[8] {{
  %x = f32[4] parameter(0)
  %g = f32[8] {gather}
  ROOT %c = f32[8] custom-call(%g), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (x: f32[4]) -> f32[8] {{
  %x = f32[4] parameter(0)
  %start = (f32[4], f32[8]) fusion(%x), kind=kCustom, calls=%fused.1
  %step = f32[8] fusion(%x), kind=kOutput, calls=%async_collective_fusion.2
  ROOT %end = f32[8] fusion(%x), kind=kCustom, calls=%fused.3
}}
"""
    (found,) = collectives(text, MeshSpec.parse(MESH).build())
    assert (found.kind, found.axes, found.count, found.sent, found.asynchronous) == (
        "all-gather", ("tensor",), 1, 16.0, True,
    )  # fmt: skip


def test_every_instruction_of_a_real_program_is_read():
    text = jax.jit(lambda x: jnp.tanh(x @ x).sum()).lower(np.ones((4, 4), np.float32)).compile().as_text()
    names = {i.name for _, i, _ in Program(text).walk()}
    assert any("dot" in name or "fusion" in name for name in names)
