"""``jaxsys generate``."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Annotated, Literal

import tyro

from parallelism.errors import UserError


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
    """Continue prompts with a model. The text is written to standard output as it is made."""

    model: str
    """A run or checkpoint, a Hugging Face directory, a GGUF file, a Hub id, or a name such as smollm2-135m-instruct."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What to continue; repeated, the prompts run together and their texts come in order, a line break after each."""
    max_tokens: int = 128
    """Tokens to make at most."""
    temperature: float = 1.0
    """0 always takes the most likely token."""
    top_k: int = 0
    """Choose among this many of the most likely tokens; 0: all."""
    top_p: float = 1.0
    """Choose among the fewest tokens whose probabilities sum to this."""
    seed: int | None = None
    """The same seed gives the same text."""
    chat: bool = False
    """The prompts are messages of a user: put them into the model's chat template."""
    json: bool = False
    """Print one JSON object a prompt, with prompt, text, tokens, logprobs and finish_reason."""
    mesh: str = ""
    """Devices, such as tensor=2; the default is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""
    max_context: int | None = None
    """Tokens of a prompt with its continuation; the default is what the model and memory allow."""
    numerics: Literal["fast", "invariant"] = "fast"
    """invariant: logprobs are bitwise the same whatever runs together; slower."""

    def run(self) -> int:
        if not self.prompt:
            raise UserError("generate: found no --prompt, expected at least one: --prompt 'The capital of France is'")
        for n, prompt in enumerate(self.prompt, 1):
            if not prompt:
                raise UserError(f"generate: --prompt {n} of {len(self.prompt)} is empty, expected a text to continue")
        from jaxsys.console import Console
        from jaxsys.llm import load
        from jaxsys.serve.sampling import Sampling

        # Before the model is loaded, so that what is wrong with them is said at once.
        sampling = Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed)
        console = Console()
        with console.stage(f"load {self.model}") as said:
            llm = load(self.model, self.mesh, self.dtype, self.max_context, numerics=self.numerics, say=console.line)
            said.append(f"{len(llm.engine.graphs)} graphs")
        start = time.perf_counter()
        sampling = dataclasses.replace(sampling, stop=llm.tokenizer.eos_ids)
        requests = llm.submit(self.prompt, sampling, chat=self.chat)
        for prompt, request in zip(self.prompt, requests, strict=True):
            for piece in llm.pieces(request):
                if not self.json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            if self.json:
                result = llm.result(request)
                values = {
                    "prompt": prompt,
                    "text": result.text,
                    "tokens": result.tokens,
                    "logprobs": result.logprobs.tolist(),
                    "finish_reason": result.finish_reason,
                }
                print(json.dumps(values, allow_nan=False), flush=True)
            else:
                print(flush=True)
        seconds, tokens = time.perf_counter() - start, sum(request.made for request in requests)
        console.line(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s")
        return 0
