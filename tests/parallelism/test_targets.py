"""Named hardware: look-up, detection, and figures that hang together."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from parallelism import TARGETS, UserError, detect, target


def test_known_names():
    assert set(TARGETS) == {"v4", "v5e", "v5p", "v6e", "tpu7x", "h100", "h200", "a100", "cpu"}
    assert target("h100").name == "h100"


def test_unknown_name_gives_the_nearest():
    with pytest.raises(UserError, match=r"unknown target 'v5': did you mean 'v5"):
        target("v5")


def test_cpu_has_no_stated_peak():
    assert detect(jax.devices()[0]) is target("cpu")
    assert target("cpu").peak("bfloat16") is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_device_kind_is_recognised(kind, name):
    found = detect(SimpleNamespace(device_kind=kind))
    assert (found and found.name) == name


def test_kind_belongs_to_one_target():
    kinds = [kind for t in TARGETS.values() for kind in t.device_kinds]
    assert len(kinds) == len(set(kinds))


def test_peak_is_found_by_dtype_or_name_and_is_none_where_not_published():
    assert target("v5e").peak(jnp.bfloat16) == target("v5e").peak("bfloat16") == 197e12
    assert target("v5e").peak("float32") is None


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"cpu"}))
def test_accelerator_figures_are_complete_and_in_their_units(name):
    t = target(name)
    assert 1e14 < t.peak("bfloat16") < 1e16
    assert 1e10 < t.memory_bytes < 1e12
    assert 5e11 < t.memory_bandwidth < 1e13
    assert 1e11 < t.interconnect_bandwidth < 1e12
    assert bool(t.topologies) == (t.platform == "tpu")
