"""``jaxsys serve``."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxsys.serve import access
from parallelism.errors import UserError


@dataclasses.dataclass(frozen=True)
class ServeArgs:
    """Answer OpenAI's HTTP requests with a model. SIGTERM finishes what runs; a second one ends at once."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run or checkpoint, a Hugging Face directory, a GGUF file, a Hub id, or a name such as smollm2-135m-instruct."""
    port: int = 8000
    """Where to listen; 0 takes a free one, and says which."""
    host: str = "127.0.0.1"
    """0.0.0.0 listens to other machines too."""
    name: str = ""
    """What clients call the model; the default is the last part of MODEL."""
    mesh: str = ""
    """Devices, such as tensor=2; the default is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""
    numerics: Literal["fast", "invariant"] = "fast"
    """invariant: logprobs are bitwise the same whatever runs together; slower."""
    max_context: int | None = None
    """Tokens of a prompt with its continuation; the default is what the model and memory allow."""
    kv_bytes: int = 512 << 20
    """What the pool of keys and values may take."""
    host_kv_bytes: int = 0
    """Host memory for keys and values that the pool has no room for."""
    policy: Literal["fair", "fcfs"] = "fair"
    """Who is next: whose client was served least, or who came first."""
    max_queue: int = 1024
    """Requests that may wait; beyond it the answer is 429."""
    max_body: int = 4 << 20
    """Bytes of a request's body; beyond it the answer is 413."""
    api_key: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A key that clients must have, this or another; better in a file, as others on the machine can read this."""
    api_keys_file: Path | None = None
    """A file of such keys, one a line; lines that begin with # are none."""
    drain_seconds: float = 30.0
    """How long what runs may take to finish after the first SIGTERM."""

    def run(self) -> int:
        access.require()
        if not self.drain_seconds >= 0:  # nor NaN
            raise UserError(f"serve: --drain-seconds {self.drain_seconds}, expected 0 or more")
        for option, value in (("max-queue", self.max_queue), ("max-body", self.max_body)):
            if value < 1:
                raise UserError(f"serve: --{option} {value}, expected at least 1")
        keys = self._keys()
        from jaxsys.serve.server import reserve

        # Before the model is loaded, so that a port that is taken is said at once.
        with reserve(self.host, self.port) as reserved:
            self._serve(reserved, keys)
        return 0

    @property
    def served_as(self) -> str:
        """What clients call the model."""
        return self.name or os.path.basename(os.path.abspath(self.model))  # abspath: of a directory called ``.``

    def _serve(self, reserved: socket.socket, keys: list[str]) -> None:
        from jaxsys.console import Console
        from jaxsys.llm import load
        from jaxsys.serve.http import Front
        from jaxsys.serve.policies import FairShare
        from jaxsys.serve.server import Server

        console = Console()
        with console.stage(f"load {self.model}") as said:
            llm = load(
                self.model, self.mesh, self.dtype, self.max_context, self.kv_bytes, self.numerics, self.host_kv_bytes,
                say=console.line,
            )  # fmt: skip
            said.append(f"{len(llm.engine.graphs)} graphs; {llm.engine.room}")
        if self.policy == "fair":
            llm.engine.scheduler.waiting = FairShare()
        name = self.served_as
        front = Front(llm, name=name, keys=keys, max_queue=self.max_queue, max_body=self.max_body)
        Server(
            front, reserved, self.drain_seconds, lambda address: console.line(f"serving {name} on {address}")
        ).run_until_ended()
        console.line("ended")

    def _keys(self) -> list[str]:
        if any(not key for key in self.api_key):
            raise UserError("serve: found an empty --api-key, expected a text")
        return [*self.api_key, *(access.read_keys(self.api_keys_file) if self.api_keys_file is not None else [])]
