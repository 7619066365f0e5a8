"""What a user gets wrong: one line on stderr that says what, exit code 2, files as they were."""

import dataclasses
import json
import subprocess
import sys

import pytest
from tiny_runs import make_config, quiet, write_model, write_recipe

from checkpoint.storage import LocalStore
from jaxsys.cli.main import main
from jaxsys.train.trainer import Trainer


@pytest.fixture
def recipe(tmp_path, material):
    return write_recipe(tmp_path / "recipe.py", material)


def files(directory):
    """What is in it, but for what a run that is refused writes too: who holds the lock."""
    paths = (p for p in sorted(directory.rglob("*")) if p.is_file() and p.suffix != ".pyc" and p.name != ".lock")
    return {str(p): p.read_bytes() for p in paths}


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the command line, and returns its one line of complaint."""

    def run(*arguments):
        before = files(tmp_path)
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        # Progress ("data ...: 40 documents") may come before what is wrong is found.
        complaints = [line for line in err.splitlines() if line.startswith("jaxsys: ")]
        assert code == 2 and len(complaints) == 1 and err.splitlines()[-1] == complaints[0], err
        assert "Traceback" not in err and out == ""
        assert {path: raw for path, raw in files(tmp_path).items() if path in before} == before
        return complaints[0]

    return run


SETTINGS = {
    "a missing model file": (["model=none", "init_from=/no/model.gguf"], ["/no/model.gguf", "no such file"]),
    "neither model nor init_from": (["model=none"], ["init_from", "model"]),
    "both model and init_from": (["init_from=smollm2-135m-instruct"], ["init_from", "model"]),
    "a mesh larger than the devices": (["mesh=fsdp=64"], ["'fsdp=64'", "needs 64 devices", "found 8"]),
    "an unknown mesh axis": (["mesh=tensr=2"], ["tensr", "'tensor'"]),
    "a mesh axis that splits nothing": (
        ["mesh=expert=2", "parameter_rules=embed=fsdp", "activation_rules=batch=fsdp"],
        ["mesh expert=2", "repeat", "leave expert out"],
    ),
    "fewer layers than stages": (["mesh=stage=2"], ["mesh stage=2", "found 1 layers", "expected at least 2"]),
    "pipeline settings without stages": (["pipeline.schedule=zb-h1"], ["pipeline.schedule=zb-h1", "leave it out"]),
    "activation rules that collide": (["activation_rules=seq=tensor"], ["activations rules split both 'seq' and"]),
    "an axis that does not divide under error": (
        ["mesh=tensor=2", "parameter_rules=heads=:error,kv_heads=:error"],
        ["layers.0.attention.k.kernel", "'kv_heads'", "size 3", "tensor=2", ":pad", ":replicate"],
    ),
    "a batch that does not divide over the mesh": (["mesh=fsdp=8"], ["4 rows", "8 shards", "multiple of 8"]),
    "a batch that does not divide by accumulate": (["accumulate=3"], ["data.batch_size 4", "accumulate=3"]),
    "a folder without text": (["data.source=EMPTY"], ["EMPTY", "holds no .txt"]),
    "an empty file": (["data.source=EMPTY/*.dat"], ["empty.dat", "no text in it"]),
    "too little text for a batch": (["data.batch_size=4096"], ["data.batch_size=4096 rows", "a data.batch_size of"]),
    "a missing source": (["data.source=/no/text"], ["/no/text", "no such file"]),
    "a missing tokenizer": (["data.tokenizer=/no/tokenizer"], ["/no/tokenizer"]),
    "a row longer than the context": (["data.seq_len=128"], ["data.seq_len 128", "context of 64"]),
    "a tokenizer larger than the model": (["model.vocab_size=200"], ["257 tokens", "200"]),
    "an unknown optimizer": (["optim.optimizer=adamv"], ["unknown optimizer 'adamv'", "'adamw'"]),
    "an unknown schedule": (["optim.schedule=cosin"], ["unknown schedule 'cosin'", "'cosine'"]),
    "an unknown remat policy": (["remat=ful"], ["unknown remat policy 'ful'", "'full'"]),
    "an unknown key": (["optim.learning_rat=1"], ["'optim.learning_rat'", "'optim.learning_rate'"]),
    "a key below a value": (["steps.x=1"], ["steps", "has no keys"]),
    "a setting without a value": (["steps"], ["--set 'steps'", "KEY=VALUE"]),
    "a value of the wrong type": (["steps=many"], ["steps", "'many'", "int"]),
    "a choice that is none": (["step_form=both"], ["step_form", "'both'", "fused, split"]),
    "no steps": (["steps=0"], ["steps", "found 0", "at least 1"]),
    "a negative interval": (["checkpoint.every=-1"], ["checkpoint.every: found -1"]),
    "a seed of too many bits": (["seed=4294967296"], ["seed", "2**31"]),
    "steps without an end": (["steps=3000000000"], ["steps", "2**31"]),
    "all text held out": (["data.heldout=1.0"], ["key data.heldout: found 1.0", "below 1"]),
    "heads that do not group": (["model.n_heads=8"], ["model.n_heads: found 8", "multiple of n_kv_heads=3"]),
    "adafactor on a padded layout": (
        ["mesh=tensor=2", "optim.optimizer=adafactor"], ["adafactor", "stored padded", ":replicate"],
    ),
    "an unknown target": (["target=h20"], ["unknown target 'h20'", "'h200'"]),
    "a run without a name": (["run="], ["key run: found ''"]),
    "a source without a name": (["data.source="], ["key data.source: found ''"]),
    "a negative learning rate": (["optim.learning_rate=-1"], ["optim.learning_rate: found -1.0", "at least 0"]),
    "an unknown family": (["model.family=mamba"], ["key model.family: found 'mamba'", "gemma2 or llama"]),
    "a profile that ends before it begins": (["profile=5:3"], ["profile '5:3'", "START:STOP"]),
    "a profile beyond the run": (["profile=50:60"], ["profile '50:60'", "ends at step 6"]),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case, refused, recipe, tmp_path):
    settings, said = SETTINGS[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "empty.dat").touch()
    settings = [s.replace("EMPTY", str(tmp_path / "empty")) for s in settings]
    line = refused("train", "--config", recipe, *(word for s in settings for word in ("--set", s)))
    for part in said:
        assert part.replace("EMPTY", str(tmp_path / "empty")) in line
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("step-*"))


@pytest.mark.parametrize("text", ["7", "3:", "a:b", "4:4"])
def test_profile_flag(refused, recipe, text):
    assert f"profile {text!r}: expected START:STOP" in refused("train", "--config", recipe, "--profile", text)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smollm2_finetun", "unknown recipe 'smollm2_finetun': did you mean 'smollm2_finetune'"),
        ("/no/recipe.py:tiny", "there is no file /no/recipe.py"),
    ],
)
def test_unknown_recipe(refused, name, said):
    assert said in refused("train", "--config", name)


def test_unknown_function_of_a_recipe_file(refused, recipe):
    assert "'tiny'" in refused("train", "--config", recipe[:-1])


def test_a_recipe_that_is_none(refused, tmp_path):
    (tmp_path / "recipe.py").write_text("def tiny():\n    return 3\n")
    assert "returned int, expected a TrainConfig" in refused("train", "--config", f"{tmp_path}/recipe.py:tiny")


# ------------------------------------------------------------------------------------------------------ model files


@pytest.fixture
def hugging_face(tmp_path, material):
    write_model(tmp_path / "model", material)
    return tmp_path / "model"


def initialised_from(recipe, path):
    return ["train", "--config", recipe, "--set", "model=none", "--set", f"init_from={path}"]


def test_a_truncated_model_file(refused, recipe, hugging_face):
    weights = hugging_face / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refused(*initialised_from(recipe, hugging_face))


def test_a_truncated_gguf_file(refused, recipe, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    assert "model.gguf" in refused(*initialised_from(recipe, tmp_path / "model.gguf"))


def test_a_mesh_axis_that_splits_nothing_of_a_served_model(refused, hugging_face):
    line = refused("generate", "--model", hugging_face, "--prompt", "x", "--mesh", "stage=2")
    assert "mesh stage=2" in line and "leave stage out" in line


def test_an_architecture_that_is_not_supported_names_those_that_are(refused, recipe, hugging_face):
    path = hugging_face / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "mamba"}))
    line = refused(*initialised_from(recipe, hugging_face))
    assert "'mamba' is not supported" in line and "gemma2, llama" in line


def test_a_weight_that_is_missing_is_named(refused, recipe, hugging_face):
    path = hugging_face / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 2}))
    assert "model.layers.1." in refused(*initialised_from(recipe, hugging_face))


# --------------------------------------------------------------------------------------------------------- existing


@pytest.mark.usefixtures("cheap_machine_code")
def test_resume_with_another_model(refused, recipe, capsys):
    assert main(["train", "--config", recipe, "--set", "steps=1"]) == 0
    assert "\n0 tokens/s" not in capsys.readouterr().err  # a first step is not measured
    line = refused("train", "--config", recipe, "--set", "model.rope_theta=5e4")
    assert "another model: rope_theta=10000.0 there, 50000.0 now" in line and "another run directory" in line
    assert "another model: d_ff=24 there, 32 now" in refused("train", "--config", recipe, "--set", "model.d_ff=32")


def test_a_run_directory_that_another_is_writing(refused, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    other = LocalStore(tmp_path / "run" / "checkpoints")
    other.acquire()
    try:
        line = refused("train", "--config", recipe)
    finally:
        other.release()
    assert "is being written by process" in line and "choose another directory" in line


def test_a_run_directory_that_is_a_file(refused, recipe, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert str(tmp_path / "run") in refused("train", "--config", recipe)


@pytest.mark.parametrize("format", ["native", "hf"])
def test_reshard_to_an_existing_destination(refused, tmp_path, format):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("mine")
    line = refused("reshard", tmp_path / "any", tmp_path / "there", "--format", format)
    assert "exists already" in line and "new directory" in line


@pytest.mark.parametrize("format", ["native", "hf"])
def test_reshard_of_a_missing_source_leaves_nothing(refused, tmp_path, format):
    assert "/no/source" in refused("reshard", "/no/source", tmp_path / "new", "--format", format)
    assert not (tmp_path / "new").exists()


def test_graphs_of_a_missing_run(refused, tmp_path):
    assert "no/graphs.json does not exist" in refused("graphs", tmp_path / "no")


def test_graphs_of_a_damaged_list(refused, tmp_path):
    (tmp_path / "graphs.json").write_text("[{")
    assert "graphs.json: not JSON" in refused("graphs", tmp_path)


# ---------------------------------------------------------------------------------------------------- configuration


def test_print_config_prints_json_and_nothing_else(recipe, capsys, tmp_path):
    assert main(["train", "--config", recipe, "--set", "optim.optimizer=sgd", "--set", "seed=3", "--print-config"]) == 0
    out, err = capsys.readouterr()
    values = json.loads(out)
    assert (values["seed"], values["optim"]["optimizer"]["kind"], err) == (3, "sgd", "")
    assert not (tmp_path / "run").exists()


def test_keys_that_depend_on_each_other_may_be_set_in_any_order(recipe, capsys):
    settings = ["model.n_heads=8", "model.n_kv_heads=4", "profile=50:60", "steps=100", "optim.optimizer=sgd"]
    words = [word for s in settings for word in ("--set", s)]
    assert main(["train", "--config", recipe, *words, "--set", "optim.optimizer.momentum=0.5", "--print-config"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["model"]["n_heads"], values["steps"], values["optim"]["optimizer"]["momentum"]) == (8, 100, 0.5)


def test_a_heldout_share_that_nothing_is_left_for_names_the_split(tmp_path, material):
    config = make_config(tmp_path / "run", material)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, heldout=0.0))
    with pytest.raises(ValueError, match="heldout has 0 of 40 documents"):
        Trainer(config, quiet())


# ------------------------------------------------------------------------------------------------- the command line

COMMAND_LINES = {
    "a misspelt command": (["genrate"], ["'genrate'", "'generate'"]),
    "a misspelt option": (["train", "--confg", "x"], ["'--confg'", "'--config'"]),
    "a value of the wrong type": (["generate", "--model", "m", "--max-tokens", "abc"], ["--max-tokens", "'abc'"]),
    "a choice that there is not": (["generate", "--model", "m", "--dtype", "float8"], ["'float8'", "bfloat16"]),
    "a missing option": (["train"], ["--config", "jaxsys train --help"]),
    "a missing value": (["train", "--config"], ["--config"]),
    "a word too many": (["graphs", "run", "other"], ["other"]),
    "no command": ([], ["train", "generate", "reshard", "graphs", "jaxsys --help"]),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_a_wrong_command_line_is_refused_in_one_line(refused, case):
    words, expected = COMMAND_LINES[case]
    complaint = refused(*words)
    assert all(word in complaint for word in expected), complaint


def test_help_is_not_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert not end.value.code and "--print-config" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_not_an_error():
    command = f"{sys.executable} -m jaxsys.cli.main train --config llama_25m --print-config"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -c1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert (done.stderr, done.stdout) == ("", "{") and done.returncode in (0, 141)
