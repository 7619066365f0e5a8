"""SmolLM2 135M with all but its last two layers frozen: what a step's save writes."""

import numpy as np
import pytest
from tiny_runs import quiet, write_text

from checkpoint import open_checkpoint
from jaxsys.train import CheckpointConfig, DataConfig, TrainConfig
from jaxsys.train.trainer import Trainer

pytestmark = pytest.mark.slow

LAYERS = (28, 29)


def test_a_save_writes_at_most_a_tenth_more_than_changed(tmp_path):
    write_text(tmp_path / "text")
    config = TrainConfig(
        run=str(tmp_path / "run"),
        init_from="smollm2-135m-instruct",
        freeze=("*", *(f"!layers.{layer}.*" for layer in LAYERS)),
        data=DataConfig(source=str(tmp_path / "text"), batch_size=1, seq_len=16, heldout=0.0),
        checkpoint=CheckpointConfig(every=1, keep=3),
        steps=3,
        eval_batches=0,
    )
    with Trainer(config, quiet()) as trainer:
        trainer.run()
    steps = [tmp_path / "run" / "checkpoints" / f"step-{step:08}" for step in (1, 2, 3)]
    readers = [open_checkpoint(step) for step in steps]
    for before, after, step in zip(readers, readers[1:], steps[1:], strict=False):
        changed = {
            name: array.nbytes
            for name, array in after.manifest.arrays.items()
            if not np.array_equal(before.read(name), after.read(name))
        }
        assert {name.split("layers.")[1].split(".")[0] for name in changed if "layers." in name} == {"28", "29"}
        written = sum(path.stat().st_size for path in step.iterdir())  # the manifest too
        print(f"{written:,} bytes written, {sum(changed.values()):,} changed: {written / sum(changed.values()):.4f}")
        assert sum(changed.values()) < 0.15 * after.manifest.nbytes
        assert written <= 1.1 * sum(changed.values())
    assert readers[-1].verify().ok
