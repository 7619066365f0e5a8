"""The layout of a model, made without an array."""

import jax
import numpy as np
import pytest
from tiny_models import EXPERTS, MODELS, x64

from jaxsys.models.state import build


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("storage", ["listed", "stacked"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_every_parameter_has_the_dtype_asked_for(model, storage, dtype):
    with x64(dtype == "float64"):
        built = build(MODELS[model], dtype=dtype, storage=storage)
        made = jax.eval_shape(built.init, np.int32(0))
    assert {stored.dtype for stored in built.layout.values()} == {np.dtype(dtype)} == {a.dtype for a in made.values()}


@pytest.mark.parametrize("config", [*MODELS.values(), EXPERTS], ids=[*MODELS, "experts"])
def test_logical_arrays_do_not_tell_how_they_are_stored(config):
    listed, stacked = (build(config, storage=storage).layout for storage in ("listed", "stacked"))
    assert listed.logical == stacked.logical and listed.keys() != stacked.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_are_not_widened_where_float64_is_on(dtype):
    with x64():
        built = build(MODELS["llama"], dtype=dtype, storage="listed")
    assert {stored.dtype for stored in built.layout.values()} == {np.dtype(dtype)}
