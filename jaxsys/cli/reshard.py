"""``jaxsys reshard``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class ReshardArgs:
    """Turn a checkpoint, or any model that jaxsys reads, into another layout.

    A native checkpoint has no mesh in it: what is written restores onto any.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A run, a checkpoint root or step, a Hugging Face directory, a GGUF file, or a name."""
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    """A directory that does not exist yet."""
    format: Literal["native", "hf"] = "native"
    """native: a jaxsys checkpoint; hf: config.json, safetensors and tokenizer."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the parameters; the default keeps them from native to native, and is float32 otherwise."""
    parameters_only: bool = False
    """Leave the optimizer state out (hf always does)."""

    def run(self) -> int:
        from jaxsys.console import Console
        from jaxsys.export import to_hugging_face, to_native

        console = Console()
        with console.stage(f"{self.source} to {self.destination}") as said:
            if self.format == "hf":
                written = to_hugging_face(self.source, self.destination, self.dtype, console)
            else:
                written = to_native(self.source, self.destination, self.dtype, self.parameters_only, console)
            said.append(f"{written / 1e6:.1f} MB as {self.format}")
        return 0
