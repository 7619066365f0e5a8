"""``jaxsys reshard``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class ReshardArgs:
    """Turn a checkpoint, or any model that jaxsys reads, into another format.

    A native checkpoint has no mesh in it: what is written restores onto any. After an interrupt the same command goes
    on where it stopped.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A run, a checkpoint root or step, an Orbax or DCP checkpoint, a Hugging Face directory, a GGUF file, safetensors,
    or a name."""
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    """What does not exist yet: a directory, or a file for gguf."""
    format: Literal["native", "safetensors", "hf", "gguf", "orbax"] = "native"
    """native: a jaxsys checkpoint; safetensors: the same arrays by the same names; hf: config.json, safetensors and
    tokenizer; gguf: one file with the tokenizer; orbax: the same arrays, as Orbax restores them."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] | None = None
    """Of the parameters (q8_0: gguf alone); the default keeps them from and to native, safetensors and orbax, and is
    float32 otherwise."""
    parameters_only: bool = False
    """Leave the optimizer state out (hf and gguf always do)."""
    select: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="GLOB")] = ()
    """Take the arrays whose names match, as 'layers.*'; may be given several times."""
    exclude: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="GLOB")] = ()
    """Of those leave the ones out whose names match; may be given several times."""
    rename: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="OLD=NEW")] = ()
    """Put NEW in the place of what the regular expression OLD matches in names; may be given several times, one after
    the other."""

    def run(self) -> int:
        from checkpoint.rules import rename_rule
        from jaxsys.console import Console
        from jaxsys.export import Asked, reshard

        console = Console()
        renamed = tuple(map(rename_rule, self.rename))
        asked = Asked(self.format, self.dtype, self.parameters_only, self.select, self.exclude, renamed)
        with console.stage(f"{self.source} to {self.destination}") as said:
            written = reshard(self.source, self.destination, asked, console)
            said.append(f"{written / 1e6:.1f} MB as {self.format}")
        return 0
