"""The server of a run: HTTP in front of the live weights, and its turns on the devices that train them."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxsys.console import Console
from jaxsys.serve import access
from jaxsys.serve.policies import FairShare
from jaxsys.share import DeviceShare
from jaxsys.train.config import ServeConfig, TrainConfig
from jaxsys.train.inference import Inference
from parallelism.errors import UserError

# For answers that run when training ends.
DRAIN_SECONDS = 10.0
# The host's work between two steps: longer than that is a checkpoint, or data that does not come.
BETWEEN_STEPS_SECONDS = 0.1


def prepare(config: ServeConfig, processes: int) -> tuple[socket.socket | None, list[str]]:
    """Where the server is going to listen, None without one, and its keys: before anything that takes long.

    Raises UserError where that cannot be.
    """
    if config.port is None:
        return None, []
    if processes > 1:
        raise UserError(
            f"serve.port={config.port} in a job of {processes} processes, expected one: a request comes to one process "
            "and must be launched by all; leave it out, and serve the run's checkpoints with jaxsys serve"
        )
    access.require()
    from jaxsys.serve.server import reserve

    keys = access.read_keys(Path(config.api_keys_file)) if config.api_keys_file else []
    return reserve(config.host, config.port), keys


class LiveServer:
    """Answers requests from the weights in training, in a thread, until it is closed.

    share: of the devices; training has its turns as "train", with what its evaluations and samples take.
    """

    def __init__(
        self,
        config: TrainConfig,
        inference: Inference,
        listening: socket.socket,
        keys: Sequence[str],
        console: Console,
    ):
        from jaxsys.serve.http import Front
        from jaxsys.serve.server import Server

        c, engine = config.serve, inference.llm.engine
        self.share = DeviceShare({"train": 1 - c.share, "serve": c.share}, {"train": BETWEEN_STEPS_SECONDS})
        self._live = engine.live
        self._tokens, self._stepped, self._reported = 0.0, 0.0, dict[str, float]()
        engine.scheduler.waiting = FairShare()
        name = os.path.basename(os.path.abspath(config.run))
        self.front = Front(inference.llm, name=name, keys=keys, max_queue=c.max_queue, share=self.share)
        inference.service = self.front.service
        begun = threading.Event()
        self.address = ""

        def listens(address: str) -> None:
            self.address = address
            console.line(f"serving {name} on {address}")
            begun.set()

        self._server = Server(self.front, listening, DRAIN_SECONDS, listens)
        self._thread = threading.Thread(target=self._server.run_until_ended, name="jaxsys-http", daemon=True)
        self._thread.start()
        begun.wait(30.0)

    def close(self) -> None:
        """Lets what runs finish, for a while, and ends."""
        self._server.drain()
        self._thread.join()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """The turn of training for one step."""
        train = self.share.parties["train"]
        before = train.used
        with self.share.turn("train"):
            yield
        self._stepped += train.used - before

    def trained(self, tokens: float) -> dict[str, float]:
        """A step of training is done; what serving cost since the one before, in seconds, for its metrics."""
        self._tokens += tokens
        train, serve = self.share.parties["train"], self.share.parties["serve"]
        now = {"serving_seconds": serve.used, "waited_for_serving_seconds": train.waited}
        spent = {name: value - self._reported.get(name, 0.0) for name, value in now.items()}
        self._reported = now
        return spent

    def report(self) -> str:
        """What serving and training cost each other, in a line."""
        train, serve = self.share.parties["train"], self.share.parties["serve"]
        stepped = max(self._stepped, 1e-9)
        rate, alone = self._tokens / (stepped + train.waited), self._tokens / stepped
        line = (
            f"serving had {serve.used:.1f} s of the devices, training {train.used:.1f} s and waited "
            f"{train.waited:.1f} s for it: {rate:,.0f} tokens/s, {alone:,.0f} without"
        )
        if serve.turns:
            each, most = 1e3 * serve.waited / serve.turns, 1e3 * serve.longest
            line += f"; a turn of the server came {each:.0f} ms late, {most:.0f} ms at most"
        kept = self._live.kept_peak
        return line + (f"; weights kept for its requests took {kept / 1e6:.0f} MB at most" if kept else "")
