"""Five recipes: where every parameter lies and what the compiled step sends are goldens.

``REWRITE_GOLDENS=1`` in the environment accepts a change. What a program sends is the compiler's choice too: where a
version of JAX chooses otherwise, a golden of its own is beside the common one (``fsdp.jax-0.12.txt``).
"""

import difflib
import os
from pathlib import Path

import jax
import pytest

from jaxsys.models.config import ModelConfig
from jaxsys.train import DataConfig, TrainConfig
from jaxsys.train.abstract import AbstractRun
from jaxsys.train.explain import step_collectives
from parallelism import report
from parallelism.collectives import summary
from parallelism.text import columns

GOLDENS = Path(__file__).parents[2] / "goldens" / "sharding"
MODEL = ModelConfig(
    "llama", vocab_size=256, d_model=64, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=8, d_ff=128, max_seq_len=128
)  # fmt: skip
RECIPES = {
    "fsdp": {"mesh": "fsdp=8"},
    "tensor": {"mesh": "tensor=4", "remat": "full"},
    "data_fsdp_tensor": {"mesh": "data=2,fsdp=2,tensor=2", "accumulate": 2},
    "context": {"mesh": "fsdp=2,context=4", "remat": "full"},
    "two_slices": {"mesh": "slices=2,data=2,fsdp=4", "step_form": "split"},
}


def describe(changes):
    """Sharding and traffic of one recipe's step, as text."""
    config = TrainConfig(
        run="golden", model=MODEL, data=DataConfig(batch_size=16, seq_len=64), compute_dtype="float32",
        storage="stacked", **changes,
    )  # fmt: skip
    run = AbstractRun(config, MODEL)
    run.prepare()
    table = [("collective", "mesh axes", "runs", "bytes sent by a device")]
    for (kind, axes), (runs, sent) in sorted(summary(step_collectives(run)).items()):
        table.append((kind, "+".join(axes), str(runs), f"{sent:.0f}"))
    shown = ", ".join(f"{name}={value}" for name, value in changes.items())
    return "\n".join([shown, "", str(report(run.plan)), "", *columns(table, right=2), ""])


@pytest.mark.parametrize("name", RECIPES)
def test_sharding_and_collectives_are_the_golden_ones(name):
    text = describe(RECIPES[name])
    common, own = (GOLDENS / f"{name}{suffix}.txt" for suffix in ("", f".jax-{jax.__version__.rpartition('.')[0]}"))
    path = own if own.exists() else common
    golden = path.read_text() if path.exists() else ""
    if os.environ.get("REWRITE_GOLDENS") and golden != text:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        golden = text
    difference = difflib.unified_diff(golden.splitlines(), text.splitlines(), path.name, "now", lineterm="", n=1)
    assert golden == text, "REWRITE_GOLDENS=1 accepts:\n" + "\n".join(difference)


def test_every_golden_has_its_recipe():
    assert {path.name.partition(".")[0] for path in GOLDENS.glob("*.txt")} == set(RECIPES)
