"""Batch-1 decode tokens/s, against transformers in the same run, on the same weights.

    python scripts/bench/decode.py [--model smollm2-135m-instruct] [--rounds 5]

The rate of new tokens after a prompt: (time for ``tokens`` + 1) less (time for 1). Without torch, only jaxsys.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jaxsys.hugepages import restart_with_huge_pages


def rate(generate: Callable[[int], object], tokens: int) -> float:
    start = time.perf_counter()
    generate(1)
    first = time.perf_counter()
    generate(tokens + 1)
    return tokens / (time.perf_counter() - first - (first - start))


def jaxsys_decode(model: str, dtype: str, prompt: list[int], tokens: int) -> Callable[[], float]:
    import jaxsys

    llm = jaxsys.load(model, dtype=dtype, max_context=len(prompt) + tokens + 2)
    return lambda: rate(lambda n: llm.generate([prompt], max_tokens=n, temperature=0.0, stop=()), tokens)


def torch_decode(directory: Path, dtype: str, prompt: list[int], tokens: int) -> Callable[[], float] | None:
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval().to(device)
    ids = torch.tensor([prompt], device=device)

    def generate(n: int) -> None:
        with torch.no_grad():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False
            )

    return lambda: rate(generate, tokens)


def main() -> None:
    from measure import interleaved, machine, serve, table
    from models import MODELS, write_random

    from jaxsys.console import Console
    from jaxsys.export import to_hugging_face

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="smollm2-135m-instruct",
        help=f"as jaxsys.load takes it; random weights: {', '.join(MODELS)}",
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        engine, dtype = options.worker.split()
        prompt = [1 + i % 1000 for i in range(options.prompt)]
        with tempfile.TemporaryDirectory() as directory:
            model, weights = options.model, Path(directory) / "hf"
            if model in MODELS:
                write_random(MODELS[model], weights)
                model = str(weights)
            elif engine == "transformers":
                to_hugging_face(model, weights, None, Console())
            if engine == "jaxsys":
                run = jaxsys_decode(model, dtype, prompt, options.tokens)
            else:
                run = torch_decode(weights, dtype, prompt, options.tokens)
        serve(run)
        return
    names = [f"{engine} {dtype}" for dtype in ("float32", "bfloat16") for engine in ("transformers", "jaxsys")]
    found = interleaved(names, options.rounds)
    print(f"{options.model}, batch 1, {options.tokens} tokens after a prompt of {options.prompt}, {machine()}")
    print(table(found, {f"jaxsys {d}": f"transformers {d}" for d in ("float32", "bfloat16")}, "tokens/s"))


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
