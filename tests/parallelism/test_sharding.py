"""Plans, constraints, and arrays made in and moved to and from their sharding."""

import math
import re
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from parallelism_arrays import single, smollm2, stack

from parallelism import (
    ACTIVATIONS,
    PARAMETERS,
    Layout,
    Logical,
    MeshSpec,
    UserError,
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

Q, K, NORM, EMBED = "layers.0.attention.q.kernel", "layers.0.attention.k.kernel", "layers.0.mlp.norm", "embed.table"
REPLICATE_HEADS = PARAMETERS.override("heads=:replicate,kv_heads=:replicate")
ERROR_HEADS = PARAMETERS.override("heads=:error,kv_heads=:error")


def mesh(text: str) -> jax.sharding.Mesh:
    return MeshSpec.parse(text).build()


# ----------------------------------------------------------------------------------------------------------- planning


def test_rules_give_the_specs():
    p = plan(smollm2(1), mesh("fsdp=2,tensor=2"), units={"heads": 3})
    assert p.shardings[EMBED].spec == P("tensor", "fsdp")
    assert p.shardings[Q].spec == P("fsdp", "tensor", None)
    assert p.shardings["layers.0.mlp.down.kernel"].spec == P("tensor", "fsdp")
    assert p.shardings[NORM].spec == P(None)


def test_a_mesh_axis_that_splits_nothing_is_refused():
    def refuse(text, rules="", used=("batch", "seq"), activations="", layout=None):
        p = plan(layout or smollm2(1), mesh(text), PARAMETERS.override(rules), {"heads": 3})
        refuse_idle_axes(p, ACTIVATIONS.override(activations), used)

    refuse("data=2,context=2,tensor=2")
    refuse("stage=2", "mlp=stage")
    refuse("stage=2", activations="seq=stage")
    with pytest.raises(
        UserError, match=r"mesh stage=2: no parameter and .*expected one of data, fsdp, expert, context, tensor;"
    ):
        refuse("data=2,stage=2")
    for idle in ({"rules": "layers=stage"}, {"activations": "pages=stage"}, {"rules": "mlp=stage:replicate"}):
        with pytest.raises(UserError, match=r"mesh stage=5: .*expected one of [^;]*tensor; leave stage out"):
            refuse("stage=5", **idle)


def test_several_mesh_axes_split_one_dimension():
    p = plan(smollm2(1), mesh("fsdp=2,tensor=2,context=2"), PARAMETERS.replace(vocab="tensor+context"), {"heads": 3})
    assert p.shardings[EMBED].spec == P(("tensor", "context"), "fsdp")


def test_mesh_axes_of_size_one_drop_out():
    p = plan(smollm2(1), mesh("data=8"))
    assert all(not any(s.spec) for s in p.shardings.values())
    assert p.decisions == ()


@pytest.mark.parametrize("tensor", [2, 4])
def test_pad_rounds_heads_and_kv_heads_up_together(tensor):
    p = plan(smollm2(1), mesh(f"tensor={tensor}"), units={"heads": 3})
    assert p.layout[Q].shape == (576, 12, 64)
    assert p.layout[K].shape == (576, 4, 64)
    assert p.shardings[Q].spec == p.shardings[K].spec == P(None, "tensor", None)
    assert p.layout[Q].parts[0].shape == (576, 9, 64)
    assert {(d.axis, d.action, d.size, d.stored) for d in p.decisions} == {
        ("heads", "pad", 9, 12),
        ("kv_heads", "pad", 3, 4),
    }


@pytest.mark.parametrize("tensor", [2, 4])
def test_replicate_keeps_both_whole_and_says_so(tensor):
    p = plan(smollm2(1), mesh(f"tensor={tensor}"), REPLICATE_HEADS, {"heads": 3})
    assert p.layout[Q].shape == (576, 9, 64)
    assert not any(p.shardings[Q].spec) and not any(p.shardings[K].spec)
    assert {(d.axis, d.action, d.size, d.stored) for d in p.decisions} == {
        ("heads", "replicate", 9, 9),
        ("kv_heads", "replicate", 3, 3),
    }


@pytest.mark.parametrize("tensor", [2, 4])
def test_error_names_the_array_the_axis_and_the_way_out(tensor):
    with pytest.raises(UserError) as error:
        plan(smollm2(1), mesh(f"tensor={tensor}"), ERROR_HEADS, {"heads": 3})
    assert str(error.value) == (
        f"{Q}: axis 'heads' of size 9 does not divide over tensor={tensor} in units of 3: "
        "change the mesh, or the parameters rule with heads=:pad or heads=:replicate"
    )


def test_units_keep_heads_whole_where_kv_heads_do_not_divide():
    layout = Layout([single("q", (8, 8), ("embed", "heads")), single("k", (8, 2), ("embed", "kv_heads"))])
    p = plan(layout, mesh("tensor=4"), REPLICATE_HEADS, units={"heads": 4})
    assert not any(p.shardings["q"].spec) and not any(p.shardings["k"].spec)


def test_divisible_heads_are_left_alone():
    p = plan(smollm2(1), mesh("fsdp=2,tensor=3"), units={"heads": 3})
    assert p.layout[Q].shape == (576, 9, 64)
    assert p.decisions == ()


def test_indivisible_axis_that_cannot_be_padded_is_not_offered_padding():
    with pytest.raises(UserError, match=r"^a: axis 'embed' of size 9 .* rule with embed=:replicate$"):
        plan(Layout([single("a", (9,), ("embed",))]), mesh("fsdp=2"))


def test_unknown_axis_and_collision_name_the_array():
    with pytest.raises(UserError, match=r"unknown logical axis of a\.b"):
        plan(Layout([single("a.b", (4,), ("wide",))]), mesh(""))
    with pytest.raises(UserError, match=r"a\.b .* split both"):
        plan(Layout([single("a.b", (4, 4), ("mlp", "vocab"))]), mesh(""))


def test_scalar_is_planned():
    assert plan(Layout([single("count", (), ())]), mesh("data=8")).shardings["count"].spec == P()


# ------------------------------------------------------------------------------------------- host to devices and back

LENIENT = PARAMETERS.override("embed=:replicate")


@st.composite
def layouts(draw) -> Layout:
    stored = []
    for i in range(draw(st.integers(1, 3))):
        axes = tuple(draw(st.permutations(["embed", "vocab", "norm", None]))[: draw(st.integers(0, 3))])
        shape = tuple(draw(st.integers(1, 9)) for _ in axes)
        dtype = np.dtype(draw(st.sampled_from([np.float32, jnp.bfloat16, np.int32])))
        if draw(st.booleans()):
            stored.append(stack(f"array{i}", draw(st.integers(1, 4)), shape, axes, dtype))
        else:
            stored.append(single(f"array{i}", shape, axes, dtype))
    return Layout(stored)


meshes = st.sampled_from(["", "data=2", "fsdp=4", "tensor=2", "data=2,fsdp=2,tensor=2", "fsdp=2,tensor=4", "tensor=8"])


def host_values(layout: Layout) -> dict[str, np.ndarray]:
    """Distinct non-zero numbers in every logical array."""
    return {
        name: np.arange(1, 1 + math.prod(a.shape)).reshape(a.shape).astype(a.dtype)
        for name, a in layout.logical.items()
    }


@settings(deadline=None, max_examples=60)
@given(layouts(), meshes)
def test_put_then_to_host_is_the_identity(layout, mesh_text):
    p = plan(layout, mesh(mesh_text), LENIENT)
    values = host_values(layout)
    arrays = put(p, lambda logical, box: values[logical.name][box])
    for key, array in arrays.items():
        assert array.sharding == p.shardings[key] and array.shape == p.layout[key].shape
    back = to_host(p.layout, arrays)
    assert back.keys() == values.keys()
    for name, value in values.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value)


@settings(deadline=None, max_examples=60)
@given(layouts(), meshes)
def test_regions_of_all_shards_tile_every_logical_array_once_a_replica(layout, mesh_text):
    p = plan(layout, mesh(mesh_text), LENIENT)
    for key, stored in p.layout.items():
        indices = p.shardings[key].devices_indices_map(stored.shape)
        copies = len(indices) * math.prod(p.shardings[key].shard_shape(stored.shape)) // math.prod(stored.shape)
        count = {part.name: np.zeros(part.shape, int) for part in stored.parts}
        for index in indices.values():
            for region in stored.regions(index):
                box = tuple(slice(a, a + n) for a, n in zip(region.start, region.size, strict=True))
                count[region.logical.name][box] += 1
        for counted in count.values():
            assert np.all(counted == copies)


@settings(deadline=None, max_examples=30)
@given(layouts(), meshes)
def test_padding_is_zero(layout, mesh_text):
    p = plan(layout, mesh(mesh_text), LENIENT)
    values = host_values(layout)
    for key, array in put(p, lambda logical, box: values[logical.name][box]).items():
        stored = p.layout[key]
        nonzero = sum(math.prod(part.shape) for part in stored.parts)
        assert np.count_nonzero(np.asarray(array)) == nonzero


@given(layouts(), meshes, meshes)
def test_planning_again_for_another_mesh_forgets_the_first_padding(layout, first, second):
    again = plan(plan(layout, mesh(first), LENIENT).layout, mesh(second), LENIENT)
    assert dict(again.layout) == dict(plan(layout, mesh(second), LENIENT).layout)


def test_put_reads_every_distinct_box_once():
    p = plan(Layout([single("a", (8, 6), ("embed", "norm"))]), mesh("data=2,fsdp=2,tensor=2"))
    read = defaultdict(int)

    def reader(logical: Logical, box: tuple[slice, ...]) -> np.ndarray:
        read[str(box)] += 1
        return np.ones([s.stop - s.start for s in box], logical.dtype)

    put(p, reader)
    rows = [str((slice(lo, lo + 4), slice(0, 6))) for lo in (0, 4)]
    assert read == {box: 1 for box in rows}


@pytest.mark.parametrize("wrong", [np.ones((1, 1), np.float32), np.ones((4, 6), np.float64)])
def test_reader_that_gives_another_shape_or_dtype_is_a_defect(wrong):
    p = plan(Layout([single("a", (4, 6), ("embed", "norm"))]), mesh(""))
    with pytest.raises(ValueError, match=r"a: the reader gave .*, expected float32\(4, 6\)"):
        put(p, lambda logical, box: wrong)


def test_array_from_put_does_not_share_memory_with_the_reader():
    p = plan(Layout([single("a", (1 << 12,), ("embed",))]), mesh("data=2"))
    source = np.ones(1 << 12, np.float32)
    array = put(p, lambda logical, box: source[box])["a"]
    source[:] = 2
    assert float(np.asarray(array).max()) == 1


def test_donating_a_replicated_array_from_put_keeps_every_copy_right():
    p = plan(Layout([single("a", (1 << 12,), ("norm",))]), mesh("data=8"))
    array = put(p, lambda logical, box: np.ones(1 << 12, np.float32))["a"]
    added = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    assert all(np.all(np.asarray(shard.data) == 2) for shard in added.addressable_shards)


def test_to_host_refuses_an_array_of_another_shape():
    layout = Layout([single("a", (4,), ("embed",))])
    with pytest.raises(ValueError, match=r"a: shape \(5,\), the layout says \(4,\)"):
        to_host(layout, {"a": jnp.ones(5)})


# ------------------------------------------------------------------------------------------------------------ creation


def init(seed):
    q, up = jax.random.split(jax.random.key(seed))
    return {"q": jax.random.normal(q, (64, 9, 16)), "layers.up": jax.random.normal(up, (2, 64, 128))}


CREATED = Layout(
    [single("q", (64, 9, 16), ("embed", "heads", "head_dim")), stack("up", 2, (64, 128), ("embed", "mlp"))]
)


def test_created_state_is_in_its_sharding_padded_with_zeros_and_equal_on_any_mesh():
    p = plan(CREATED, mesh("fsdp=2,tensor=4"), units={"heads": 3})
    state = create(p, init, jax.jit, np.uint32(7))
    assert {k: a.sharding for k, a in state.items()} == p.shardings
    assert not np.any(np.asarray(state["q"])[:, 9:])
    alone = to_host(CREATED, create(plan(CREATED, mesh("")), init, jax.jit, np.uint32(7)))
    for name, value in to_host(p.layout, state).items():
        np.testing.assert_array_equal(value, alone[name])


def test_no_device_ever_holds_a_whole_array_while_the_state_is_created():
    programs = []

    def compile(fn, out_shardings):
        compiled = jax.jit(fn, out_shardings=out_shardings).lower(np.uint32(0)).compile()
        programs.append(compiled.as_text())
        return compiled

    create(plan(CREATED, mesh("fsdp=2,tensor=4"), units={"heads": 3}), init, compile, np.uint32(0))
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"32\[([\d,]+)\]", programs[0])]
    assert max(sizes) <= 64 * 128 * 2 // 8


def test_init_that_does_not_fit_the_layout_is_a_defect():
    p = plan(CREATED, mesh(""))
    with pytest.raises(ValueError, match=r"init and layout differ in \['q'\]"):
        create(p, lambda: {"layers.up": jnp.ones((2, 64, 128))}, jax.jit)
    with pytest.raises(ValueError, match=r"q: init made float32\(64, 12, 16\), the layout says float32\(64, 9, 16\)"):
        create(p, lambda: {"layers.up": jnp.ones((2, 64, 128)), "q": jnp.ones((64, 12, 16))}, jax.jit)


# --------------------------------------------------------------------------------------------------------- constraints


def test_constrain_is_the_identity_without_a_context():
    x = jnp.ones((8, 4))
    assert current() is None
    assert constrain(x, ("batch", "act_mlp")) is x


def test_constrain_is_the_identity_on_one_device():
    x = jnp.ones((8, 4))
    with sharding_context(mesh("")):
        assert constrain(x, ("batch", "act_mlp")) is x


def test_constrain_lays_out_by_the_rules():
    m = mesh("data=2,tensor=4")

    def f(x):
        with sharding_context(m):
            return constrain(x, ("batch", "seq", "act_mlp"))

    y = jax.jit(f)(jnp.ones((8, 3, 4)))
    assert y.sharding.is_equivalent_to(jax.NamedSharding(m, P("data", None, "tensor")), 3)


def test_indivisible_activation_follows_its_rule():
    m = mesh("data=2,tensor=4")

    def f(x, rules):
        with sharding_context(m, rules):
            return constrain(x, ("batch", "act_heads"))

    y = jax.jit(f, static_argnums=1)(jnp.ones((8, 9)), ACTIVATIONS)
    assert y.sharding.is_equivalent_to(jax.NamedSharding(m, P("data", None)), 2)
    with pytest.raises(
        UserError, match=r"activation \(8, 9\): axis 'act_heads' of size 9 does not divide over tensor=4"
    ):
        jax.eval_shape(lambda x: f(x, ACTIVATIONS.replace(act_heads=":error")), jnp.ones((8, 9)))


def test_manual_axes_are_left_out_inside_shard_map():
    m = mesh("data=2,tensor=4")
    specs = []

    def piece(x):
        jaxpr = jax.make_jaxpr(lambda x: constrain(x, ("batch", "act_mlp")))(x)
        specs.append(str(jaxpr))
        return constrain(x, ("batch", "act_mlp")) * 2

    def f(x):
        with sharding_context(m):
            return jax.shard_map(piece, mesh=m, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})(x)

    np.testing.assert_array_equal(jax.jit(f)(jnp.ones((8, 4))), 2 * np.ones((8, 4)))
    assert "P(None, 'tensor')" in specs[0]


def test_constrain_inside_a_fully_manual_region_is_the_identity():
    m = mesh("data=2,tensor=4")

    def f(x):
        with sharding_context(m):
            return jax.shard_map(
                lambda x: constrain(x, ("batch", "act_mlp")) * 2, mesh=m, in_specs=P("data"), out_specs=P("data")
            )(x)

    np.testing.assert_array_equal(jax.jit(f)(jnp.ones((8, 4))), 2 * np.ones((8, 4)))


def test_gradient_passes_through_a_constraint():
    def f(x):
        with sharding_context(mesh("data=8")):
            return (constrain(x, ("batch",)) ** 2).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(f))(jnp.arange(8.0)), 2 * np.arange(8.0))


def test_context_ends_with_its_block_and_nests():
    outer, inner = mesh("data=2"), mesh("tensor=2")
    with sharding_context(outer):
        with sharding_context(inner):
            assert current().mesh is inner
        assert current().mesh is outer
    assert current() is None


def test_context_refuses_rules_that_pad():
    with pytest.raises(UserError, match="activations cannot be padded"), sharding_context(mesh(""), PARAMETERS):
        pass


def test_constrain_checks_the_axis_names_on_one_device_too():
    with sharding_context(mesh("")):
        with pytest.raises(UserError, match="unknown logical axis of activation"):
            constrain(jnp.ones(4), ("bach",))
        with pytest.raises(ValueError, match="1 dimensions"):
            constrain(jnp.ones(4), ("batch", "seq"))


def test_platform_is_that_of_the_mesh_and_not_of_this_machine():
    for there, name in (("tpu", "tpu"), ("cuda", "gpu"), ("cpu", "cpu")):
        elsewhere = SimpleNamespace(devices=np.array([SimpleNamespace(platform=there)], object))
        with sharding_context(elsewhere):
            assert platform() == name
    assert platform() == jax.default_backend()
