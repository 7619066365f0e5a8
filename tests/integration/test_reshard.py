"""``jaxsys reshard``: what comes out, that ``jaxsys.load`` reads it, and what it never touches."""

import shlex

import ml_dtypes
import numpy as np
import pytest
from tiny_runs import MODEL, ROOT, write_tokenizer

import checkpoint
import jaxsys
from checkpoint.formats.safetensors import SafetensorsDir
from checkpoint.writer import Piece
from jaxsys import configuration
from jaxsys.cli.main import main
from jaxsys.models.families import FAMILIES
from jaxsys.models.pretrained import Pretrained, expected_weights, file_shape
from jaxsys.tokenizer import Tokenizer
from parallelism.layout import Logical

pytestmark = pytest.mark.usefixtures("cheap_machine_code")

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
STEP = "checkpoints/step-00000006"


def state():
    """Parameters, Adam's moments (some too small, some too large for float16) and a count, by logical name."""
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(0, 0.1, a.shape).astype(np.float32) for n, a in expected_weights(MODEL).items()}
    arrays["optimizer.nu.norm.scale"] = np.float32([1e-12, 1e6] * (MODEL.d_model // 2))
    arrays["optimizer.count"] = np.asarray(6, np.int32)
    return arrays


def write_run(directory, arrays):
    """What a training run leaves, as far as resharding reads it."""
    specs = {n: Logical(n, a.shape, a.dtype, (None,) * a.ndim) for n, a in arrays.items()}
    pieces = (Piece(specs[n], (0,) * a.ndim, a) for n, a in arrays.items())
    checkpoint.write(directory / STEP, 6, {"model": configuration.to_dict(MODEL)}, specs.values(), pieces)
    write_tokenizer(directory / "checkpoints" / "tokenizer")
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("reshard") / "run", state())


@pytest.fixture(scope="module")
def hugging_face(run):
    """The run's parameters as a Hugging Face directory in float32."""
    assert reshard(run, run.parent / "hf", "--format", "hf") == 0
    return run.parent / "hf"


def reshard(source, destination, *flags):
    return main(["reshard", str(source), str(destination), *flags])


def native(directory):
    reader = checkpoint.open_checkpoint(directory)
    assert reader.manifest.meta["model"] == configuration.to_dict(MODEL)
    return {name: reader.read(name) for name in reader.manifest.arrays}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True, err_msg=name)


def cast(arrays, dtype):
    """Parameters in ``dtype``, the rest as it is."""
    return {n: a if n.startswith("optimizer.") else a.astype(DTYPES[dtype]) for n, a in arrays.items()}


def parameters(arrays):
    return {n: a for n, a in arrays.items() if not n.startswith("optimizer.")}


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_a_run_to_native(run, tmp_path, dtype):
    assert reshard(run, tmp_path / "out", *(["--dtype", dtype] if dtype else [])) == 0
    assert_same(native(tmp_path / "out"), cast(state(), dtype or "float32"))


def test_only_the_parameters(run, tmp_path):
    assert reshard(run, tmp_path / "out", "--parameters-only", "--dtype", "bfloat16") == 0
    assert_same(native(tmp_path / "out"), cast(parameters(state()), "bfloat16"))


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_a_run_to_hugging_face(run, tmp_path, dtype):
    assert reshard(run, tmp_path / "out", "--format", "hf", *(["--dtype", dtype] if dtype else [])) == 0
    files = SafetensorsDir(tmp_path / "out")
    names, logical = FAMILIES["llama"].weight_names(MODEL), expected_weights(MODEL)
    expected = cast(parameters(state()), dtype or "float32")
    assert_same(
        {n: files.read(n) for n in files}, {names[n]: a.reshape(file_shape(logical[n])) for n, a in expected.items()}
    )


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_hugging_face_to_native(hugging_face, tmp_path, dtype):
    assert reshard(hugging_face, tmp_path / "out", *(["--dtype", dtype] if dtype else [])) == 0
    assert_same(native(tmp_path / "out"), cast(parameters(state()), dtype or "float32"))


def test_the_commands_in_the_documentation(run, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "my-run").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    lines = (ROOT / "docs" / "checkpointing.md").read_text().splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("jaxsys reshard ")]
    assert len(commands) == 7 and not any(main(command) for command in commands)
    assert_same(native("out"), state())
    assert_same(native("half"), cast(state(), "bfloat16"))
    assert_same(native("model"), parameters(state()))
    assert {info.dtype for info in SafetensorsDir("exported").values()} == {DTYPES["bfloat16"]}
    assert SafetensorsDir("tensors").keys() == state().keys()
    assert Pretrained.open("model.gguf").config == MODEL
    layers = {name for name in state() if name.startswith("layers.") and ".mlp." not in name}
    assert native("some").keys() == {name.replace("layers", "blocks") for name in layers}


def test_both_formats_generate_the_same(run, hugging_face, tmp_path):
    assert reshard(run, tmp_path / "native", "--parameters-only") == 0
    made = []
    for path in (tmp_path / "native", hugging_face):
        llm = jaxsys.load(path, max_context=16)
        (result,) = llm.generate([[1, 2, 3]], max_tokens=4, temperature=0.0, stop=())
        made.append(result.tokens)
    assert made[0] == made[1] and len(made[0]) == 4


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def complaint(capsys):
    """Runs the command line, and returns its one line of complaint."""

    def run(*arguments):
        capsys.readouterr()
        assert reshard(*arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("jaxsys: ") and sum(line.startswith("jaxsys: ") for line in lines) == 1
        return lines[-1]

    return run


def files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format", ["native", "hf"])
def test_what_somebody_else_made_meanwhile_stays(complaint, run, tmp_path, monkeypatch, format):
    """A destination that appears after it was looked for is not this call's to remove."""
    save = Tokenizer.save

    def late(tokenizer, directory):
        save(tokenizer, directory)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("mine")

    monkeypatch.setattr(Tokenizer, "save", late)
    assert str(tmp_path / "out") in complaint(run, tmp_path / "out", "--format", format)
    assert [str(path.relative_to(tmp_path)) for path in files(tmp_path)] == ["out/precious"]


@pytest.mark.parametrize("source", ["", "checkpoints", STEP])
@pytest.mark.parametrize("destination", ["checkpoints/step-00000099", "exported", f"{STEP}/out"])
def test_a_destination_inside_the_run_is_refused(complaint, run, source, destination):
    before = files(run)
    line = complaint(run / source, run / destination)
    assert "inside its source" in line and "elsewhere" in line
    assert files(run) == before


@pytest.mark.parametrize("url", ["s3://bucket/x", "gs://bucket"])
def test_a_url_as_the_destination_is_refused(complaint, run, tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    line = complaint(run, url)
    assert f"{url} is a URL, expected a directory" in line and f"jaxsys checkpoint copy DIR {url}" in line
    assert list(tmp_path.iterdir()) == []


def test_a_url_as_the_source_is_refused(complaint, tmp_path):
    line = complaint("s3://bucket/x", tmp_path / "out")
    assert "are read from directories; copy it first: jaxsys checkpoint copy s3://bucket/x DIR" in line


def test_a_destination_of_another_steps_name_is_refused(complaint, run, tmp_path):
    for name in ("step-00000005", "step-6"):
        line = complaint(run, tmp_path / name)
        assert f"{name} is to hold step 6: call it step-00000006" in line
        assert list(tmp_path.iterdir()) == []
    assert reshard(run, tmp_path / "step-00000006") == 0
    assert main(["checkpoint", "verify", str(tmp_path / "step-00000006")]) == 0


def test_beside_the_run_is_not_inside(run, tmp_path):
    (tmp_path / "run").symlink_to(run)
    assert reshard(tmp_path / "run" / STEP, tmp_path / "run-exported", "--parameters-only") == 0


@pytest.mark.parametrize("kind", ["native", "hf"])
@pytest.mark.parametrize("format", ["native", "hf"])
def test_a_value_beyond_the_dtype_is_named_and_nothing_is_written(complaint, tmp_path, kind, format):
    arrays = state()
    arrays["layers.0.mlp.up.kernel"][3, 4] = 1e6
    source = write_run(tmp_path / "run", arrays)
    if kind == "hf":
        assert reshard(source, tmp_path / "hf", "--format", "hf") == 0
        source = tmp_path / "hf"
    before = files(tmp_path)
    line = complaint(source, tmp_path / "out", "--format", format, "--dtype", "float16")
    assert "'layers.0.mlp.up.kernel'" in line and "float16" in line
    assert files(tmp_path) == before


def test_a_missing_tokenizer_is_found_before_anything_is_written(complaint, tmp_path, monkeypatch):
    source = write_run(tmp_path / "run", state())
    for path in (source / "checkpoints" / "tokenizer").iterdir():
        path.unlink()
    (source / "checkpoints" / "tokenizer").rmdir()
    monkeypatch.setattr("jaxsys.export.convert", None)
    assert "no tokenizer" in complaint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_named(complaint, run, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file/out" in complaint(run, tmp_path / "file" / "out")


def test_an_infinity_that_was_there_is_kept(tmp_path):
    arrays = state()
    arrays["norm.scale"][0] = np.inf
    assert reshard(write_run(tmp_path / "run", arrays), tmp_path / "out", "--dtype", "float16") == 0
    assert np.isinf(native(tmp_path / "out")["norm.scale"][0])
