"""Recipes: the resolved configuration of each is a golden; ``REWRITE_GOLDENS=1`` accepts a change."""

import difflib
import json
import os
from pathlib import Path

import pytest

from jaxsys import configuration
from jaxsys.cli.main import main
from jaxsys.train import TrainConfig
from jaxsys.train.recipes import RECIPES, find
from parallelism.errors import UserError

GOLDENS = Path(__file__).parents[2] / "goldens" / "recipes"


@pytest.mark.parametrize("name", RECIPES)
def test_resolved_configuration_is_the_golden_one(name):
    path, text = GOLDENS / f"{name}.json", configuration.dumps(find(name)) + "\n"
    if os.environ.get("REWRITE_GOLDENS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    golden = path.read_text() if path.exists() else ""
    difference = difflib.unified_diff(golden.splitlines(), text.splitlines(), str(path.name), "now", lineterm="", n=1)
    assert golden == text, "REWRITE_GOLDENS=1 accepts:\n" + "\n".join(difference)


def test_every_golden_has_its_recipe():
    assert {path.stem for path in GOLDENS.glob("*.json")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_configuration_that_a_checkpoint_holds_gives_back_the_recipe(name):
    assert configuration.from_dict(TrainConfig, json.loads(configuration.dumps(find(name)))) == find(name)


def test_a_pretrained_model_takes_the_place_of_the_recipes(capsys):
    assert main(["train", "--config", "llama_25m", "--init-from", "somewhere", "--print-config"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["init_from"], shown["model"]) == ("somewhere", None)
    assert main(["train", "--config", "llama_25m", "--init-from", "somewhere", "--set", "model.d_model=64"]) == 2
    assert "--init-from somewhere and --set model.d_model=64 exclude each other" in capsys.readouterr().err


def test_print_config_shows_what_set_changed(capsys):
    arguments = ["--set", "optim.schedule=wsd", "--set", "steps=7", "--print-config"]
    assert main(["train", "--config", "llama_25m", *arguments]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["steps"] == 7 and shown["optim"]["schedule"]["kind"] == "wsd"
    assert shown["model"]["d_model"] == find("llama_25m").model.d_model


def test_unknown_key_ends_the_command_with_the_nearest(capsys):
    assert main(["train", "--config", "llama_25m", "--set", "stepz=7"]) == 2
    out = capsys.readouterr()
    assert "'stepz'" in out.err and "'steps'" in out.err and out.err.count("\n") == 1 and not out.out


def test_recipe_of_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import dataclasses\nfrom jaxsys.train.recipes import llama_25m\n"
        "def wide():\n    return dataclasses.replace(llama_25m(), steps=3)\n"
        "def wrong():\n    return 3\n"
    )
    assert find(f"{path}:wide").steps == 3
    for name, part in (("wode", "'wide'"), ("wrong", "expected a TrainConfig")):
        with pytest.raises(UserError, match=part):
            find(f"{path}:{name}")


def test_unknown_recipe_and_missing_file_are_named():
    with pytest.raises(UserError, match="'llama_25m'"):
        find("llama_25n")
    with pytest.raises(UserError, match=r"no file nowhere\.py"):
        find("nowhere.py:f")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\nimport nowhere_to_be_found\n", "line 2: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("def f(:\n", "line 1: SyntaxError: "),
        ("def f(steps):\n    return steps\n", "TypeError: f() missing 1 required positional argument: 'steps'"),
        ("def f():\n    return {}['x']\n", "line 2: KeyError: 'x'"),
        (
            "from jaxsys.train import DataConfig\ndef f():\n    return DataConfig(seq_len=0)\n",
            "line 3: configuration key seq_len: found 0",
        ),
    ],
)
def test_a_recipe_file_that_fails_is_one_line_with_path_line_and_cause(tmp_path, text, said):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        find(f"{path}:f")
    assert f"recipe {path}" in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_in_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match=r"is not a \.py file"):
        find(f"{tmp_path}/mine.txt:f")
