"""Model families: each module maps one family's files to ``ModelConfig`` and logical names, and holds no model code.

A family is a module with the names of ``Family``; adding one is adding a module and its line in ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import numpy as np

from checkpoint.formats.gguf import GGUFHeader
from jaxsys.models.config import ModelConfig
from jaxsys.models.families import gemma2, llama, mixtral, olmoe, qwen3_moe
from parallelism.errors import UserError

T = TypeVar("T")


class Family(Protocol):
    """What a family module offers for Hugging Face files.

    Logical names are those of ``models.state``: ``layers.3.attention.q.kernel``.
    """

    def config_from_hf(self, values: Mapping[str, Any], where: str) -> ModelConfig:
        """From a parsed config.json; ``where`` names it in errors. Raises UserError for what is not supported."""

    def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """The config.json that transformers, old and new, reads as the same model: all but dtype and token ids."""

    def weight_names(self, config: ModelConfig) -> Mapping[str, str | tuple[str, ...]]:
        """Logical name -> Hugging Face tensor name, the two arrays differ by a reshape only; or the names of several,
        which are the slices of the logical array along its first dimension (experts)."""

    def redundant_weights(self, config: ModelConfig) -> dict[str, str | np.ndarray]:
        """Tensors that some Hugging Face files hold besides, and what they repeat: a logical array, or these values."""


class GGUFFamily(Protocol):
    """What the module of a family offers whose GGUF files can be read and written."""

    def config_from_gguf(self, file: GGUFHeader) -> ModelConfig:
        """From a GGUF file's metadata, and what its tensors say of the architecture."""

    def config_to_gguf(self, config: ModelConfig) -> dict[str, Any]:
        """The metadata that describes the architecture, without its prefix."""

    def gguf_names(self, config: ModelConfig) -> dict[str, str]:
        """Logical name -> GGUF tensor name."""

    def redundant_gguf(self, config: ModelConfig) -> dict[str, str | np.ndarray]:
        """As ``redundant_weights``, for GGUF files."""

    def undo_gguf(self, config: ModelConfig, name: str, array: np.ndarray) -> np.ndarray:
        """The logical array ``name``, or rows of whole heads of it, from its GGUF tensor (float32), before the
        reshape."""

    def to_gguf(self, config: ModelConfig, name: str, array: np.ndarray) -> np.ndarray:
        """The inverse of ``undo_gguf``, in the dtype of ``array``."""


FAMILIES: dict[str, Family] = {
    "gemma2": gemma2,
    "llama": llama,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen3_moe": qwen3_moe,
}
"""By Hugging Face ``model_type``."""

GGUF_FAMILIES: dict[str, GGUFFamily] = {"gemma2": gemma2, "llama": llama}
"""By GGUF ``general.architecture``."""


def family(name: Any, where: str) -> Family:
    """The family called ``name``; ``where`` is the file that says so. Raises UserError naming those supported."""
    return _supported(FAMILIES, name, where)


def gguf_family(name: Any, where: str) -> GGUFFamily:
    """``family`` of a GGUF file."""
    return _supported(GGUF_FAMILIES, name, where)


def _supported(families: dict[str, T], name: Any, where: str) -> T:
    if not isinstance(name, str) or name not in families:
        raise UserError(f"{where}: architecture {name!r} is not supported; supported are {', '.join(families)}")
    return families[name]
