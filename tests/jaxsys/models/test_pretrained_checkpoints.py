"""Models in Orbax and DCP checkpoints: logical arrays, or Hugging Face tensors with config.json."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from golden_models import FAMILIES, GOLDENS
from tiny_runs import write_tokenizer

from checkpoint.formats.orbax import write_orbax
from checkpoint.formats.safetensors import SafetensorsDir
from jaxsys import configuration
from jaxsys.console import Console
from jaxsys.export import Asked, reshard
from jaxsys.hub import ModelSource, resolve
from jaxsys.llm import _read
from jaxsys.models.pretrained import Pretrained, expected_weights
from jaxsys.tokenizer import Tokenizer
from parallelism import MeshSpec
from parallelism.errors import UserError

GOLDEN = GOLDENS / "llama2"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def logical_arrays(opened):
    return {name: opened.reader(logical, logical.box) for name, logical in expected_weights(opened.config).items()}


def write_logical(directory, opened, change=lambda arrays: arrays, **options):
    arrays = change(logical_arrays(opened))
    stream = [(name, x.shape, x.dtype, [((0,) * x.ndim, x)]) for name, x in arrays.items()]
    return write_orbax(directory, stream, {"model": configuration.to_dict(opened.config)}, **options)


def tensors(directory=GOLDEN):
    """Hugging Face's, by name."""
    files = SafetensorsDir(directory)
    return {name: files.read(name) for name in files}


def save_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def save_dcp(path, state):
    torch = pytest.importorskip("torch")
    dcp = pytest.importorskip("torch.distributed.checkpoint")

    def of(value):
        return {k: of(v) for k, v in value.items()} if isinstance(value, dict) else torch.from_numpy(value.copy())

    dcp.save(of(state), checkpoint_id=path)


SAVE = {"orbax": save_orbax, "dcp": save_dcp}
both = pytest.mark.parametrize("kind", SAVE)


def assert_same_model(path, golden=GOLDEN):
    found, expected = Pretrained.open(path), Pretrained.open(golden)
    assert found.config == expected.config
    for name, logical in expected_weights(expected.config).items():
        np.testing.assert_array_equal(found.reader(logical, logical.box), expected.reader(logical, logical.box), name)
        box = tuple(slice(n // 2, n) for n in logical.shape)
        np.testing.assert_array_equal(found.reader(logical, box), expected.reader(logical, box), name)


# ----------------------------------------------------------------------------------------------------- logical arrays


@pytest.mark.parametrize("family", FAMILIES)
def test_logical_arrays_that_say_their_model(tmp_path, family):
    write_logical(tmp_path / "out", Pretrained.open(GOLDENS / family))
    assert resolve(tmp_path / "out") == ModelSource(tmp_path / "out", "orbax")
    assert_same_model(tmp_path / "out", GOLDENS / family)


def test_the_newest_step_and_a_boxed_read_in_another_dtype(tmp_path):
    opened = Pretrained.open(GOLDEN)
    zeros = {name: np.zeros_like(x) for name, x in logical_arrays(opened).items()}
    write_logical(tmp_path / "root", opened, lambda arrays: zeros, step=5)
    write_logical(tmp_path / "root", opened, step=12)
    assert_same_model(tmp_path / "root")
    logical = dataclasses.replace(expected_weights(opened.config)["embed.kernel"], dtype=np.dtype(ml_dtypes.bfloat16))
    got = Pretrained.open(tmp_path / "root").reader(logical, (slice(3, 5), slice(0, 4)))
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got, opened.reader(logical, (slice(3, 5), slice(0, 4))))


def test_optimizer_state_is_left_unread_and_other_arrays_are_not(tmp_path):
    opened = Pretrained.open(GOLDEN)
    write_logical(tmp_path / "run", opened, lambda arrays: arrays | {"optimizer.count": np.zeros(())})
    assert_same_model(tmp_path / "run")
    write_logical(tmp_path / "more", opened, lambda arrays: arrays | {"other": np.zeros(2)})
    with pytest.raises(UserError, match="not used: weight 'other'"):
        Pretrained.open(tmp_path / "more")
    less = lambda arrays: {n: x for n, x in arrays.items() if n != "norm.scale"}  # noqa: E731
    write_logical(tmp_path / "less", opened, less)
    with pytest.raises(UserError, match=r"missing weight 'norm\.scale'"):
        Pretrained.open(tmp_path / "less")


# ----------------------------------------------------------------------------------------------- Hugging Face tensors


@both
@pytest.mark.parametrize("inside", [True, False])
def test_hugging_face_tensors_with_their_configuration_in_the_checkpoint_or_beside_it(tmp_path, kind, inside):
    SAVE[kind](tmp_path / "saved", tensors())
    shutil.copy(GOLDEN / "config.json", tmp_path / "saved" if inside else tmp_path)
    assert resolve(tmp_path / "saved").kind == kind
    assert_same_model(tmp_path / "saved")


@pytest.mark.parametrize("place", ["root", "root/4", "root/4/default", "."])
def test_the_configuration_of_a_step_lies_anywhere_above_it(tmp_path, place):
    (tmp_path / "root").mkdir()
    with ocp.CheckpointManager(tmp_path / "root") as manager:
        manager.save(4, args=ocp.args.StandardSave(tensors()))
    shutil.copy(GOLDEN / "config.json", tmp_path / place)
    assert_same_model(tmp_path / "root")


@both
@pytest.mark.parametrize("prefix", ["model", "params", "state.params"])
def test_tensors_under_a_prefix_beside_other_state(tmp_path, kind, prefix):
    state = {f"{prefix}.{name}": x for name, x in tensors().items()}
    SAVE[kind](tmp_path / "saved", {**state, "optimizer": {"step": np.ones(1), "mu": {"x": np.ones(2)}}})
    shutil.copy(GOLDEN / "config.json", tmp_path / "saved")
    assert_same_model(tmp_path / "saved")


@both
def test_nested_names_and_experts_a_tensor_each(tmp_path, kind):
    state: dict = {}
    for name, x in tensors(GOLDENS / "mixtral").items():
        *above, last = name.split(".")
        branch = state
        for key in above:
            branch = branch.setdefault(key, {})
        branch[last] = x
    SAVE[kind](tmp_path / "saved", {"state": state})
    shutil.copy(GOLDENS / "mixtral" / "config.json", tmp_path / "saved")
    assert_same_model(tmp_path / "saved", GOLDENS / "mixtral")


@both
@pytest.mark.parametrize("prefix", ["", "model."])
def test_tensors_missing_left_over_or_of_another_shape_are_named(tmp_path, kind, prefix):
    good, norm = tensors(), "model.norm.weight"
    cases = {
        "missing": ({n: x for n, x in good.items() if n != norm}, f"missing weight '{norm}'"),
        "more": (good | {"model.other": np.ones(2, np.float32)}, "not used: weight 'model.other'"),
        "shape": (good | {norm: np.ones(3, np.float32)}, f"weight '{norm}' has shape (3,)"),
        "integers": (good | {norm: np.ones(3, np.int32)}, f"weight '{norm}' has dtype int32"),
    }
    for case, (state, message) in cases.items():
        SAVE[kind](tmp_path / case, {prefix + name: x for name, x in state.items()})
        shutil.copy(GOLDEN / "config.json", tmp_path / case)
        with pytest.raises(UserError, match=re.escape(("under 'model.': " if prefix else "") + message)) as error:
            Pretrained.open(tmp_path / case)
        assert "\n" not in str(error.value)


def test_two_models_in_one_checkpoint_are_refused(tmp_path):
    save_orbax(tmp_path / "saved", {"model": tensors(), "ema": tensors()})
    shutil.copy(GOLDEN / "config.json", tmp_path / "saved")
    with pytest.raises(UserError, match=r"under 'ema\.' and 'model\.', expected one"):
        Pretrained.open(tmp_path / "saved")


def test_nothing_of_the_model_there_names_what_is_missing(tmp_path):
    save_orbax(tmp_path / "saved", {"x": np.ones(2)})
    shutil.copy(GOLDEN / "config.json", tmp_path / "saved")
    with pytest.raises(UserError, match=r"missing weights 'model\.embed_tokens\.weight'.* more"):
        Pretrained.open(tmp_path / "saved")


@both
def test_no_configuration_says_where_it_is_looked_for(tmp_path, kind):
    SAVE[kind](tmp_path / "saved", tensors())
    other = "'model' in its custom_metadata, or " if kind == "orbax" else ""
    with pytest.raises(UserError, match=f"expected {other}config.json in it or beside it"):
        Pretrained.open(tmp_path / "saved")


def test_a_directory_of_safetensors_stays_strict_about_prefixes(tmp_path):
    from checkpoint.formats.safetensors import write_safetensors

    write_safetensors(tmp_path / "hf", ((f"model.{name}", x) for name, x in tensors().items()))
    shutil.copy(GOLDEN / "config.json", tmp_path / "hf")
    with pytest.raises(UserError, match="missing weights"):
        Pretrained.open(tmp_path / "hf")


# ------------------------------------------------------------------------------------------------- used by the program


@both
@pytest.mark.parametrize("place", [".", "saved", "saved/tokenizer"])
def test_the_tokenizer_is_in_the_checkpoint_or_beside_it_and_reshard_takes_both(tmp_path, kind, place):
    SAVE[kind](tmp_path / "saved", {"model": tensors()})
    shutil.copy(GOLDEN / "config.json", tmp_path)
    write_tokenizer(tmp_path / "made")
    (tmp_path / place).mkdir(exist_ok=True)
    for file in (tmp_path / "made").iterdir():
        shutil.copy(file, tmp_path / place)
    expected = Tokenizer.from_hf(tmp_path / "made").encode("some text")
    assert Tokenizer.of(resolve(tmp_path / "saved")).encode("some text") == expected
    reshard(str(tmp_path / "saved"), tmp_path / "native", Asked(), Console())
    assert_same_model(tmp_path / "native")


def test_without_a_tokenizer_the_error_says_where_to_put_it(tmp_path):
    write_logical(tmp_path / "out", Pretrained.open(GOLDEN))
    with pytest.raises(UserError, match=r"no tokenizer beside the checkpoint, expected .*out/tokenizer"):
        Tokenizer.of(resolve(tmp_path / "out"))


def test_an_engine_gets_the_same_parameters(tmp_path):
    write_logical(tmp_path / "root", Pretrained.open(GOLDEN), step=3)
    devices = MeshSpec.parse("tensor=2").build()
    for dtype in ("float32", "bfloat16"):
        (_, found), (_, expected) = (_read(resolve(path), devices, dtype) for path in (tmp_path / "root", GOLDEN))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].sharding == value.sharding
            np.testing.assert_array_equal(found[name], value, name)


def test_other_models_need_neither_library():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['tensorstore', 'orbax', 'torch']);"
        "from jaxsys.models.pretrained import Pretrained; Pretrained.open(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, GOLDEN], check=True)
