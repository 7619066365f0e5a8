"""The real TPU compiler, without a TPU: small steps compiled ahead of time. Needs libtpu (extra ``tpu``)."""

import dataclasses
import os

import pytest

pytest.importorskip("libtpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax

from jaxsys.models.config import ModelConfig
from jaxsys.train.explain import OutOfMemory
from scripts.aot_report import HEAD, RECIPES, Recipe, compile_recipe

MODEL = ModelConfig(
    "llama", vocab_size=4096, d_model=512, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=64, d_ff=1024, max_seq_len=8192
)  # fmt: skip
SMALL = {
    "fsdp": Recipe(MODEL, "v5e:2x2", "fsdp=4", (8, 1024)),
    "fsdp and tensor": Recipe(MODEL, "v5e:2x2", "fsdp=2,tensor=2", (8, 1024)),
    "context": Recipe(MODEL, "v5e:2x2", "fsdp=2,context=2", (2, 2048)),
}


@pytest.fixture(autouse=True)
def low_effort():
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", before)


@pytest.mark.parametrize("name", SMALL)
def test_a_step_fits_replicates_nothing_by_accident_and_reduce_scatters_its_gradients(name):
    result = compile_recipe(SMALL[name], print)
    assert result.faults() == []
    assert result.run.model.storage == "stacked"  # the TPU's form, on whatever machine this is
    kinds = {c.kind for c in result.explanation.collectives if "fsdp" in c.axes}
    assert {"all-gather", "reduce-scatter"} <= kinds
    assert len(result.row(name, SMALL[name])) == len(HEAD)


def test_a_step_that_does_not_fit_says_where_memory_goes_and_what_to_change():
    said = []
    wide = dataclasses.replace(SMALL["fsdp"], batch=(4096, 4096), changes={"remat": "none"})
    with pytest.raises(OutOfMemory, match=r"a device has 16\.0 GiB: remat=full \(now none\); accumulate=1024"):
        compile_recipe(wide, said.append)
    assert said[0].splitlines()[1].startswith("activations and temporaries")


def test_every_recipe_of_the_report_is_a_configuration():
    for recipe in RECIPES.values():
        assert recipe.config().model == recipe.model
