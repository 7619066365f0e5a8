"""A tiny random model of bytes, and a server of it on a free port in a thread of this process."""

import contextlib
import itertools
import logging
import threading
import time

import numpy as np
import tokenizers

from jaxsys.graphs import Graphs
from jaxsys.live import Live
from jaxsys.llm import LLM
from jaxsys.models.config import ModelConfig
from jaxsys.models.state import build
from jaxsys.serve.engine import Engine, EngineConfig
from jaxsys.serve.http import Front
from jaxsys.serve.policies import FairShare
from jaxsys.serve.scheduler import Size
from jaxsys.serve.server import Server, reserve
from jaxsys.tokenizer import Tokenizer
from parallelism import PARAMETERS, MeshSpec, plan, put

SECONDS = 60.0
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}{% endfor %}<s>"
SIZES = (Size(4, 4), Size(32, 4, queries=8))
CONFIG = ModelConfig("llama", 258, 32, 2, 6, 2, 8, 48, max_seq_len=128, tie_embeddings=True)


def tokenizer() -> Tokenizer:
    """A byte-level tokenizer of the 256 bytes, ``<s>`` and ``</s>``."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, bos_id=256, eos_ids=[257], chat_template=TEMPLATE)


def make_llm(**options) -> LLM:
    """options: of the engine's configuration."""
    devices = MeshSpec.parse("").build()
    model = build(CONFIG)
    placed = plan(model.layout, devices, PARAMETERS, model.units)
    rng = np.random.default_rng(0)
    logical = build(CONFIG, storage="listed").layout.logical
    arrays = {
        name: rng.standard_normal(a.shape, np.float32) * (1.0 if "norm" in name else 0.3) for name, a in logical.items()
    }
    graphs = Graphs(devices)
    params = put(placed, lambda logical, box: arrays[logical.name][box])
    options = {"page_size": 8, "max_steps": 8, "kv_bytes": 1 << 20, "sizes": SIZES} | options
    config = EngineConfig(**options)
    engine = Engine(model.with_layout(placed.layout), Live(params, graphs), graphs, config)
    graphs.freeze()
    engine.scheduler.waiting = FairShare()
    return LLM(engine, tokenizer())


class Running:
    """A server in a thread. front, server: what runs there. address: as ``http://127.0.0.1:PORT``.

    defects: tracebacks that went to its log.
    """

    def __init__(self, llm: LLM, drain_seconds: float = SECONDS, **options):
        self.front = Front(llm, name="tiny", **options)
        begun, addresses = threading.Event(), []
        self.server = Server(
            self.front, reserve("127.0.0.1", 0), drain_seconds, lambda a: (addresses.append(a), begun.set())
        )
        self.defects: list[logging.LogRecord] = []
        self._handler = logging.Handler()
        self._handler.addFilter(lambda record: record.exc_info is not None)
        self._handler.emit = self.defects.append
        logging.getLogger("uvicorn.error").addHandler(self._handler)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert begun.wait(SECONDS)
        self.address = addresses[0]

    def _run(self) -> None:
        self.server.run_until_ended()
        logging.getLogger("uvicorn.error").removeHandler(self._handler)

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def idle(self) -> None:
        """Waits until nothing runs; then every page must have come back."""
        until = time.monotonic() + SECONDS
        scheduler = self.front.llm.engine.scheduler
        while self.front.calls or self.front.service.active or scheduler.busy:
            assert time.monotonic() < until, (self.front.calls, self.front.service.active, scheduler.busy)
            time.sleep(0.005)
        assert [pages.used for pages in scheduler.pages] == [0]

    def wait(self) -> None:
        """Until it has ended."""
        self._thread.join(SECONDS)
        assert self.ended

    def stop(self) -> None:
        self.server.handle_exit(15, None)
        self.server.handle_exit(15, None)
        self.wait()


@contextlib.contextmanager
def running(llm: LLM, **options):
    """A server that is idle at the end, with all its pages, and had no defect."""
    server = Running(llm, **options)
    try:
        yield server
        server.idle()
        assert not server.defects, logging.Formatter().format(server.defects[0])
    finally:
        if not server.ended:
            server.stop()


class Gate:
    """Lets the engine's thread through ``after`` times, then holds it before its next step until it is opened."""

    def __init__(self, engine, monkeypatch, after=0):
        self.open, self.reached, launch, steps = threading.Event(), threading.Event(), engine.launch, itertools.count()

        def held(max_steps=None):
            if next(steps) < after:
                return launch(max_steps)
            self.reached.set()
            assert self.open.wait(SECONDS)
            return launch(max_steps)

        monkeypatch.setattr(engine, "launch", held)
