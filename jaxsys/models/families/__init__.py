"""Model families: each module maps one family's files to ``ModelConfig`` and logical names, and holds no model code.

A family is a module with the names of ``Family``; adding one is adding a module and its line in ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from checkpoint.formats.gguf import GGUFFile
from jaxsys.models.config import ModelConfig
from jaxsys.models.families import gemma2, llama
from parallelism.errors import UserError


class Family(Protocol):
    """What a family module offers. Logical names are those of ``models.state``: ``layers.3.attention.q.kernel``."""

    def config_from_hf(self, values: Mapping[str, Any], where: str) -> ModelConfig:
        """From a parsed config.json; ``where`` names it in errors. Raises UserError for what is not supported."""

    def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """The config.json that transformers, old and new, reads as the same model: all but dtype and token ids."""

    def weight_names(self, config: ModelConfig) -> dict[str, str]:
        """Logical name -> Hugging Face tensor name; the two arrays differ by a reshape only."""

    def redundant_weights(self, config: ModelConfig) -> dict[str, str | np.ndarray]:
        """Tensors that some Hugging Face files hold besides, and what they repeat: a logical array, or these values."""

    def config_from_gguf(self, file: GGUFFile) -> ModelConfig:
        """From a GGUF file's metadata, and what its tensors say of the architecture."""

    def gguf_names(self, config: ModelConfig) -> dict[str, str]:
        """Logical name -> GGUF tensor name."""

    def redundant_gguf(self, config: ModelConfig) -> dict[str, str | np.ndarray]:
        """As ``redundant_weights``, for GGUF files."""

    def undo_gguf(self, config: ModelConfig, name: str, array: np.ndarray) -> np.ndarray:
        """The logical array ``name`` from its GGUF tensor (float32), before the reshape."""


FAMILIES: dict[str, Family] = {"gemma2": gemma2, "llama": llama}
"""By Hugging Face ``model_type`` and GGUF ``general.architecture``, which agree for these."""


def family(name: Any, where: str) -> Family:
    """The family called ``name``; ``where`` is the file that says so. Raises UserError naming those supported."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{where}: architecture {name!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[name]
