"""Everything at once in one process and in two: offload, the split step, ZeRO-1, balanced batches over ``context``,
checkpoints in memory, weights from files and samples give the same bits."""

import pytest
from test_train_layouts import Job, losses
from tiny_runs import state_bytes, write_model, write_recipe

from checkpoint import open_checkpoint
from jaxsys.train.metrics import read

SETTINGS = (
    "mesh=fsdp=2,context=2", "data.batch_size=8", "data.seq_len=64", "data.split_shares=0.5", "storage=stacked",
    "eval_batches=0", "step_form=split", "update_groups=1", "remat=full", "steps=3", "checkpoint.ram_every=1",
    "offload=optimizer,parameters,activations=residual", "model=none",
    "parameter_rules=embed=none", "gradient_rules=embed=none", "optimizer_rules=embed=fsdp",
    "sample.prompts=The,Document", "sample.every=2", "sample.max_tokens=4", "sample.temperature=1",
)  # fmt: skip
STEP = "step-00000003"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, material):
    """Of one process and of two: the run's directory, that of its checkpoints in memory, what process 0 printed."""
    root = tmp_path_factory.mktemp("features")
    write_model(root / "model", material)
    jobs = {}
    for count in (1, 2):
        (root / str(count)).mkdir()
        recipe = write_recipe(root / str(count) / "recipe.py", material)
        settings = (*SETTINGS, f"init_from={root / 'model'}", f"checkpoint.ram={root / f'ram-{count}'}")
        jobs[count] = Job(recipe, count, 4 // count, *settings)
    return {count: (root / str(count) / "run", root / f"ram-{count}", job.finish()[0]) for count, job in jobs.items()}


def test_losses_samples_and_state_are_the_same_bits(runs):
    (one, _, _), (two, _, _) = runs[1], runs[2]
    assert list(losses(one)) == [1, 2, 3] and losses(two) == losses(one)
    samples = [[row["samples"] for row in read(run) if "samples" in row] for run in (one, two)]
    assert len(samples[0]) == 3 and samples[0] == samples[1]
    assert [pair["prompt"] for pair in samples[0][0]] == ["The", "Document"]
    assert state_bytes(two, 3) == state_bytes(one, 3)


def test_checkpoints_in_memory_are_those_on_disk(runs):
    run, ram, _ = runs[2]
    ((saved,),) = [list(directory.glob(f"own/*/{STEP}")) for directory in ram.iterdir()]
    reader = open_checkpoint(saved)
    assert reader.verify().ok and len(list(saved.glob("data-*.bin"))) == 2
    assert {name: reader.read(name).tobytes() for name in reader.manifest.arrays} == state_bytes(run, 3)


def test_a_process_counts_the_tokens_of_all(runs):
    rows = [[row["tokens"] for row in read(run) if "tokens" in row] for run, _, _ in runs.values()]
    assert rows[0] == rows[1] and len(rows[0]) == 3
