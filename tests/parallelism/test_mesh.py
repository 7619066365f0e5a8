"""MeshSpec: parsing, resolution and the mesh it builds."""

from types import SimpleNamespace

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from parallelism import AXES, MeshSpec, UserError


@st.composite
def specs(draw) -> MeshSpec:
    sizes = [draw(st.integers(1, 6)) for _ in AXES]
    slices = draw(st.sampled_from([n for n in range(1, 7) if sizes[0] % n == 0]))
    if draw(st.booleans()):
        sizes[draw(st.integers(0, 5))] = -1
    return MeshSpec(*sizes, slices=slices)


@given(specs())
def test_string_and_back_is_the_same_spec(spec):
    assert MeshSpec.parse(str(spec)) == spec


@given(specs(), st.integers(1, 64))
def test_resolved_spec_fits_the_devices_and_keeps_the_given_axes(spec, n):
    try:
        resolved = spec.resolve(n)
    except UserError:
        return
    product = 1
    for given_size, size in zip(spec.sizes, resolved.sizes, strict=True):
        assert size == given_size or given_size == -1
        product *= size
    assert product == n if -1 in spec.sizes else product <= n


def test_empty_string_is_one_device():
    assert MeshSpec.parse("") == MeshSpec.parse("  ") == MeshSpec()
    assert MeshSpec.parse("").build().size == 1


def test_canonical_string_is_in_axis_order_without_ones():
    assert str(MeshSpec.parse(" tensor = 2 , data=3,fsdp=1 ")) == "data=3,tensor=2"


def test_minus_one_takes_the_rest():
    assert MeshSpec.parse("data=2,fsdp=-1").resolve(8) == MeshSpec(data=2, fsdp=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensr=2", "unknown axis in mesh 'tensr=2': 'tensr': did you mean 'tensor'?"),
        ("x=2", "known: context, data, expert, fsdp, slices, stage, tensor"),
        ("data=0", "data=0: expected a whole number of at least 1 or -1"),
        ("data=-2", "data=-2: expected a whole number of at least 1 or -1"),
        ("slices=-1", "slices=-1: expected a whole number of at least 1$"),
        ("data=2,data=2", "data is given twice"),
        ("data=-1,fsdp=-1", "more than one axis"),
        ("data=2,", "found '', expected AXIS=NUMBER"),
        ("data", "found 'data', expected AXIS=NUMBER"),
        ("data=two", "found 'data=two', expected AXIS=NUMBER"),
        ("data=2.5", "expected AXIS=NUMBER"),
        ("data=3,slices=2", "data=3 is not a multiple of slices=2"),
    ],
)
def test_bad_string_is_one_line_that_says_what_is_wrong(text, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as error:
        MeshSpec.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [2.0, True, "2"])
def test_size_that_is_no_integer_is_an_error(size):
    with pytest.raises(UserError, match="expected a whole number"):
        MeshSpec(data=size)


def test_too_large_a_mesh_names_both_numbers_and_how_to_have_virtual_devices():
    with pytest.raises(UserError, match=r"needs 16 devices, found 8.*JAX_NUM_CPU_DEVICES=16"):
        MeshSpec.parse("data=16").build()
    with pytest.raises(UserError, match=r"needs 16 devices, found 8"):
        MeshSpec.parse("data=16,fsdp=-1").build()


def test_rest_that_does_not_come_out_whole_is_an_error():
    with pytest.raises(UserError, match=r"8 devices do not divide by 3"):
        MeshSpec.parse("data=3,fsdp=-1").resolve(8)


def test_mesh_has_all_six_axes_in_order_and_auto():
    mesh = MeshSpec.parse("fsdp=2,tensor=-1").build()
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Auto,) * 6
    assert mesh.devices.shape == (1, 2, 1, 1, 1, 4)
    assert set(mesh.devices.flat) == set(jax.devices())


def test_small_mesh_takes_the_first_devices():
    mesh = MeshSpec.parse("data=3").build()
    assert list(mesh.devices.flat) == jax.devices()[:3]


def test_mesh_uses_the_devices_it_is_given():
    assert list(MeshSpec.parse("data=-1").build(jax.devices()[4:6]).devices.flat) == jax.devices()[4:6]


def hardware(slices: int, each: int, per_process: int = 4) -> list[SimpleNamespace]:
    """Devices of a multi-slice machine, interleaved as ``jax.devices()`` need not be sorted by slice."""
    return [
        SimpleNamespace(
            id=s * each + i,
            slice_index=s,
            process_index=(s * each + i) // per_process,
            platform="gpu",
            device_kind="some GPU",
        )
        for i in range(each)
        for s in range(slices)
    ]


def test_slices_are_joined_along_the_outermost_part_of_data_only():
    arranged = MeshSpec.parse("data=4,tensor=2,slices=2")._arrange(hardware(slices=2, each=4))
    slice_of = [[d.slice_index for d in row.flat] for row in arranged]
    assert slice_of == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_wrong_number_of_slices_is_an_error():
    with pytest.raises(UserError, match=r"found devices of 4 slice\(s\), expected 2: give slices=4"):
        MeshSpec.parse("data=4,slices=2").build(hardware(slices=4, each=4))


def test_slice_too_small_for_its_part_is_an_error():
    devices = [*hardware(slices=1, each=6), *[d for d in hardware(slices=2, each=2) if d.slice_index == 1]]
    with pytest.raises(UserError, match=r"needs 4 devices in each of 2 slices, found a slice of 2"):
        MeshSpec.parse("data=8,slices=2").build(devices)


def test_virtual_devices_stand_in_for_slices_in_equal_runs():
    mesh = MeshSpec.parse("data=2,fsdp=2,slices=2").build()
    assert [d.id for d in mesh.devices.flat] == [0, 1, 4, 5]


def test_process_without_a_device_in_the_mesh_is_an_error():
    with pytest.raises(UserError, match=r"takes 4 of 8 devices and leaves process 1 without any"):
        MeshSpec.parse("data=4").build(hardware(slices=1, each=8))
