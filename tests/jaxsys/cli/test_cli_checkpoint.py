"""``jaxsys checkpoint``: what it prints, its exit codes, and what it refuses in one line."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from tiny_runs import MODEL, write_tokenizer

import checkpoint
from checkpoint.storage import LocalStore
from checkpoint.writer import Piece
from jaxsys import configuration
from jaxsys.cli.main import main
from jaxsys.models.pretrained import expected_weights
from parallelism.layout import Logical

META = {"config": {"optim": {"learning_rate": 0.1}, "profile": None}, "versions": {"jax": "1.2"}}


def write_step(directory, step, arrays, meta=META):
    specs = {n: Logical(n, a.shape, a.dtype, ("embed", None)[: a.ndim]) for n, a in arrays.items()}
    pieces = (Piece(specs[n], (0,) * a.ndim, a) for n, a in arrays.items())
    checkpoint.write(directory / f"step-{step:08d}", step, meta, specs.values(), pieces)


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "layers.0.w": np.arange(12, dtype=np.float32).reshape(3, 4),
        "layers.1.w": rng.standard_normal((3, 4)).astype(np.float32),
        "optimizer.count": np.asarray(7, np.int32),
    }


@pytest.fixture
def run(tmp_path):
    """A run whose two steps differ in an array."""
    root = tmp_path / "run" / "checkpoints"
    write_step(root, 5, arrays())
    write_step(root, 10, arrays(1))
    return tmp_path / "run"


@pytest.fixture
def call(capsys):
    """Gives a command; returns its exit code and what it printed."""

    def command(*words):
        capsys.readouterr()
        code = main(["checkpoint", *map(str, words)])
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err  # no colours where there is no terminal
        return code, out, err

    return command


def step(run, number=10):
    return run / "checkpoints" / f"step-{number:08d}"


def damage(path):
    raw = bytearray(path.read_bytes())
    raw[3] ^= 1
    path.write_bytes(raw)


# -- ls


def test_ls_prints_a_line_a_step(call, run):
    code, out, _ = call("ls", run)
    head, *rows = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    assert code == 0 and head == ["step", "written", "state", "format", "arrays", "bytes", "own", "shared"]
    assert [row[0] for row in rows] == ["5", "10"] and [row[2:6] for row in rows] == [["good", "2", "3", "100 B"]] * 2
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", rows[0][1])


def test_ls_as_json_of_several_places(call, run):
    damage(step(run) / "manifest.json")
    code, out, _ = call("ls", "--json", run, step(run, 5))
    found = json.loads(out)
    assert code == 0 and [(info["path"], info["step"]) for info in found] == [
        (str(run), 5), (str(run), 10), (str(step(run, 5)), 5),
    ]  # fmt: skip
    assert found[0]["error"] is None and "is damaged" in found[1]["error"]
    assert found[2]["own_bytes"] == sum(p.stat().st_size for p in step(run, 5).iterdir())


def test_ls_says_what_is_damaged(call, run, tmp_path):
    damage(step(run) / "manifest.json")
    code, out, _ = call("ls", run)
    assert code == 0 and "10    " in out and "damaged  " in out
    assert out.splitlines()[-1].startswith(f"step 10: {step(run)}/manifest.json is damaged: digest")


def test_ls_of_a_run_that_saved_nothing(call, tmp_path):
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    assert call("ls", tmp_path / "new")[:2] == (0, "no checkpoint yet\n")
    assert call("ls", tmp_path / "new", "--json")[:2] == (0, "[]\n")
    code, _, err = call("verify", tmp_path / "new")
    assert code == 2 and err.endswith("holds no checkpoint yet; give a place with one\n")


# -- show


def test_show_prints_meta_and_arrays(call, run):
    code, out, _ = call("show", run)
    lines = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    assert code == 0 and lines[0] == [f"{step(run)}: step 10"]
    assert ["config.optim.learning_rate", "0.1"] in lines and ["config.profile", "null"] in lines
    assert ["layers.0.w", "float32", "3 x 4", "embed, -", "1", "48 B"] in lines
    assert ["optimizer.count", "int32", "scalar", "1", "4 B"] in lines
    assert lines[-1] == ["3 of 3 arrays, 100 B of 100 B"]


def test_show_what_is_selected_as_json(call, run):
    code, out, _ = call("show", step(run, 5), "--json", "--select", "layers.*", "--select", "opt*")
    assert code == 0 and json.loads(out) == {
        "where": str(step(run, 5)),
        "step": 5,
        "meta": META,
        "arrays": {
            "layers.0.w": {"dtype": "float32", "shape": [3, 4], "axes": ["embed", None], "chunks": 1, "nbytes": 48},
            "layers.1.w": {"dtype": "float32", "shape": [3, 4], "axes": ["embed", None], "chunks": 1, "nbytes": 48},
            "optimizer.count": {"dtype": "int32", "shape": [], "axes": [], "chunks": 1, "nbytes": 4},
        },
    }
    assert call("show", run, "--select", "*0*")[1].endswith("1 of 3 arrays, 48 B of 100 B\n")


# -- verify


def test_verify_says_what_is_damaged_and_mends_it(call, run, tmp_path):
    assert call("verify", run)[:2] == (0, f"{step(run)}: good, 3 chunks, 100 B\n")
    shutil.copytree(run, tmp_path / "other")
    (data,) = step(run, 5).glob("data-*")
    good = data.read_bytes()
    damage(data)
    assert call("verify", run)[0] == 0
    code, out, _ = call("verify", run, "--all")
    assert code == 1 and f"{step(run, 5)}: DAMAGED, 3 chunks" in out and f"{step(run)}: good" in out
    assert f"  array 'layers.0.w': bytes 0 to 48 of {data} are damaged: digest" in out
    code, out, err = call("verify", run, "--all", "--json", "--repair", tmp_path / "other")
    bad = json.loads(out)[0]
    assert code == 0 and bad["ok"] and bad["damage"][0]["mended_from"] == str(step(tmp_path / "other", 5))
    assert data.read_bytes() == good and call("verify", run, "--all")[0] == 0
    assert re.search(r"^verify 100/100 0 of 0 MB$", err, re.MULTILINE)


# -- diff


def test_diff_says_which_arrays_differ_and_by_how_much(call, run):
    old, new = arrays(), arrays(1)
    new["layers.0.w"] = old["layers.0.w"].copy()
    new["layers.0.w"][2, 1] += 0.5
    del new["optimizer.count"]
    write_step(run / "checkpoints", 15, new)
    code, out, err = call("diff", step(run, 5), run)
    one, two, three, last = out.splitlines()
    assert code == 1 and last == "3 of 3 arrays differ"
    assert one == "layers.0.w: 1 of 12 elements, at most 0.5 (relative 0.0526), most at [2, 1]"
    assert two.startswith("layers.1.w: 12 of 12 elements") and three == "optimizer.count: not in B"
    assert call("diff", step(run, 5), run, "--select", "layers.0.w", "--tolerance", "0.06")[:2] == (0, "the same\n")
    assert re.search(r"^diff: 192 B read, 0 B with the same digests", err, re.MULTILINE)


def test_diff_reads_nothing_of_what_is_the_same_unless_told(call, run):
    assert call("diff", run, step(run))[:2] == (0, "the same\n")
    assert "diff: 0 B read, 100 B with the same digests" in call("diff", run, step(run))[2]
    assert "diff: 200 B read, 0 B with the same digests" in call("diff", run, step(run), "--full")[2]


def test_diff_as_json(call, tmp_path):
    for step_, values in ((1, [1.0, np.nan, np.inf]), (2, [1.0, 2.0, 3.0])):
        write_step(tmp_path / "x", step_, {"x": np.array(values, np.float32)})
    code, out, _ = call("diff", tmp_path / "x" / "step-00000001", tmp_path / "x", "--json")
    found = json.loads(out)
    assert code == 1 and found["same"] is False and found["arrays"] == 1
    (array,) = found["differing"]
    assert (array["different"], array["nans"], array["largest_difference"], array["where"]) == (2, 1, "inf", [2])


def test_diff_of_a_checkpoint_and_a_model_in_other_files(call, tmp_path):
    rng = np.random.default_rng(0)
    weights = {n: rng.normal(0, 0.1, a.shape).astype(np.float32) for n, a in expected_weights(MODEL).items()}
    meta = {"model": configuration.to_dict(MODEL)}
    write_step(tmp_path / "run" / "checkpoints", 6, weights, meta)
    write_tokenizer(tmp_path / "run" / "checkpoints" / "tokenizer")
    assert main(["reshard", str(tmp_path / "run"), str(tmp_path / "hf"), "--format", "hf"]) == 0
    assert call("diff", tmp_path / "run", tmp_path / "hf")[:2] == (0, "the same\n")
    changed = {**weights, "norm.scale": weights["norm.scale"] + 1}
    write_step(tmp_path / "other", 6, changed, meta)
    code, out, _ = call("diff", tmp_path / "hf", tmp_path / "other")
    assert code == 1 and out.splitlines()[0].startswith("norm.scale: 16 of 16 elements, at most 1 (")


# -- copy and gc


def test_copy_takes_the_tokenizer_and_goes_on(call, run, tmp_path):
    write_tokenizer(run / "checkpoints" / "tokenizer")
    code, out, err = call("copy", run, tmp_path / "to")
    assert (code, out) == (0, f"{tmp_path}/to: step 10\n") and "written, 0 B there already" in err
    assert (tmp_path / "to" / "tokenizer" / "tokenizer.json").is_file()
    code, out, err = call("copy", run, tmp_path / "to", "--all")
    assert (code, out) == (0, f"{tmp_path}/to: step 5\n{tmp_path}/to: step 10\n")
    assert call("diff", run, tmp_path / "to", "--full")[0] == 0
    assert f"copy {run}: 0 B written, " in call("copy", run, tmp_path / "to", "--all")[2]


def test_copy_of_all_says_that_some_are_left_out(call, run, tmp_path, caplog):
    damage(step(run, 5) / "manifest.json")
    code, out, _ = call("copy", run, tmp_path / "to", "--all")
    assert (code, out) == (1, f"{tmp_path}/to: step 10\n") and "not copied" in caplog.text
    assert call("copy", run, tmp_path / "newest")[0] == 0


def test_gc_says_what_goes_and_what_went(call, run):
    size = sum(p.stat().st_size for p in step(run, 5).iterdir())
    code, out, _ = call("gc", run, "--keep", "1", "--dry-run")
    assert (code, out) == (0, f"step 5\nwould free {size} B, files: 2\n")
    assert step(run, 5).exists()
    assert call("gc", run, "--keep", "1")[1] == out.replace("would free", "freed")
    assert not step(run, 5).exists() and call("verify", run, "--all")[0] == 0
    assert call("gc", run)[1] == "freed 0 B, files: 0\n"


# -- what it refuses


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ls"], "checkpoint ls: found no PATH, expected at least one"),
        (["ls", "{}/nowhere"], "checkpoint {}/nowhere does not exist; check the path"),
        (["ls", "{}"], "{} is not a checkpoint: no manifest.json"),
        (["show", "{}/run", "--select", "layer.*"], "select 'layer.*' meets none of the 3 arrays"),
        (
            ["verify", "{}/run/checkpoints/step-00000010/manifest.json"],
            "checkpoint {}/run/checkpoints/step-00000010/mani",
        ),
        (["verify", "{}/run", "--repair", "{}/nowhere"], "checkpoint {}/nowhere does not exist"),
        (["diff", "{}/run"], "Missing from jaxsys checkpoint diff: B"),
        (["diff", "{}/run", "{}/nowhere"], "model '{}/nowhere': no such path"),
        (["diff", "{}/run", "{}/run", "--tolerance", "-1"], "tolerance -1.0: expected a number from 0 on"),
        (
            ["diff", "{}/run", "{}/run", "--tolerance", "x"],
            "--tolerance: found 'x', expected a number; see jaxsys checkp",
        ),
        (["copy", "{}/run", "{}/run"], "{}/run/checkpoints is where these checkpoints are already"),
        (["copy", "{}/run", "{}/run/checkpoints/step-00000005"], "{}/run/checkpoints/step-00000005 is one checkpoint"),
        (["copy", "{}/nowhere", "{}/to"], "checkpoint {}/nowhere does not exist"),
        (["gc", "{}/run", "--keep", "0"], "keep 0: expected at least 1"),
        (
            ["gc", "{}/run", "--every", "5"],
            "every 5: expected at least 1, and with it how many of the newest to keep (--keep)",
        ),
        (
            ["gc", "{}/run", "--keep", "two"],
            "--keep: found 'two', expected a whole number; see jaxsys checkpoint gc --help",
        ),
        (["gc", "{}/run/checkpoints/step-00000005"], "{}/run/checkpoints/step-00000005 is one step"),
        (["gc", "{}/run", "--kep", "1"], "unknown option of jaxsys checkpoint gc '--kep': did you mean '--keep'"),
        (["list", "{}/run"], "unknown command of jaxsys checkpoint 'list': "),
        (["verfy", "{}/run"], "unknown command of jaxsys checkpoint 'verfy': did you mean 'verify'?"),
        ([], "Missing subcommand: Expected one of"),
        (["--all"], "unknown command of jaxsys checkpoint '--all': known: copy, diff, gc, ls, show, verify"),
    ],
)
def test_what_it_cannot_do_is_one_line(call, run, tmp_path, words, says):
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, out, err = call(*(word.format(tmp_path) for word in words))
    *progress, line = err.splitlines()
    assert code == 2 and out == "" and line.startswith(f"jaxsys: {says.format(tmp_path)}"), err
    assert not progress
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_a_directory_that_is_written_is_refused(call, run):
    store = LocalStore(run / "checkpoints")
    store.acquire()
    code, _, err = call("gc", run)
    assert code == 2 and f"is being written by process {os.getpid()}" in err and err.count("\n") == 1
    assert call("ls", run)[0] == call("verify", run)[0] == 0
    store.release()


def test_damage_that_diff_meets_is_one_line(call, run):
    (data,) = step(run, 5).glob("data-*")
    damage(data)
    code, out, err = call("diff", step(run, 5), run, "--full")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"jaxsys: array 'layers.0.w': bytes 0 to 48 of {data} are damaged")


@pytest.mark.parametrize("words", [["--help"], ["diff", "--help"]])
def test_help_is_not_an_error(capsys, words):
    with pytest.raises(SystemExit) as end:
        main(["checkpoint", *words])
    assert not end.value.code and ("tolerance" in capsys.readouterr().out) == (len(words) > 1)
