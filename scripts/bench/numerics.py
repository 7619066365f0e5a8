"""How far log-probabilities of the same tokens lie apart: sampled or scored, by numerics, precision, mesh and program.

    python scripts/bench/numerics.py [--model smollm2-135m-instruct] [--tokens 48]

Some texts are continued by temperature 1, all at once, and then scored in several ways. Each cell is the largest
difference of a token's natural log-probability, and the mean.
"""

from __future__ import annotations

import argparse
import itertools
import os

from jaxsys.malloc import restart_with_tunables

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a king who",
    "def quicksort(values):\n",
    "The three laws of thermodynamics say that",
    "To make bread, take",
    "In 1905 Albert Einstein",
    "Dear Sir or Madam,\n",
    "The difference between a virus and a bacterium is",
)


DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=48, help="of each continuation")
    options = parser.parse_args()
    restart_with_tunables()
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")

    import numpy as np

    import jaxsys

    sampled, scores, texts = {}, {}, {}
    for dtype, (numerics, mesh) in itertools.product(
        DTYPES, (("invariant", ""), ("fast", ""), ("invariant", "tensor=2"))
    ):
        llm = jaxsys.load(options.model, mesh, dtype, max_context=256, kv_bytes=64 << 20, numerics=numerics)
        key = dtype, numerics, mesh
        results = llm.generate(PROMPTS, max_tokens=options.tokens, temperature=1.0, seed=1, stop=())
        # The texts are those of float32, so that all score the same; what was sampled is scored too.
        own = [[*r.prompt_tokens, *r.tokens] for r in results]
        texts.setdefault("texts", own)
        sampled[key] = np.concatenate([r.logprobs for r in results]), [len(r.prompt_tokens) for r in results]
        scored = llm.score(own)
        made = [s[n - 1 :] for s, n in zip(scored, sampled[key][1], strict=True)]
        sampled[key] = np.abs(sampled[key][0] - np.concatenate(made))
        scores[key] = np.concatenate(llm.score(texts["texts"]))
        if key[1:] == ("invariant", ""):
            scores[dtype, "rows", ""] = np.concatenate(_whole_rows(llm, texts["texts"]))
        del llm

    def cells(differences):
        return " | ".join(f"{d.max():.1e}, {d.mean():.1e}" if d.any() else "0" if d.size else "" for d in differences)

    def apart(a, b):
        return [np.abs(scores[dtype, *a] - scores[dtype, *b]) for dtype in DTYPES]

    invariant, halves = ("invariant", ""), ("invariant", "tensor=2")
    wide = np.abs(scores["float32", *invariant] - scores["bfloat16", *invariant])
    print("| log-probabilities of the same tokens, largest and mean difference | float32 | bfloat16 |\n|---|---|---|")
    for what, differences in (
        ("sampled and scored, `invariant`", [sampled[d, *invariant] for d in DTYPES]),
        ("sampled and scored, `invariant`, `tensor=2`", [sampled[d, *halves] for d in DTYPES]),
        ("sampled and scored, `fast`", [sampled[d, "fast", ""] for d in DTYPES]),
        ("scored, `fast` and `invariant`", apart(("fast", ""), invariant)),
        ("scored, `tensor=2` and one device, `invariant`", apart(halves, invariant)),
        ("the train step's forward, and scored by `invariant`", apart(("rows", ""), invariant)),
        ("scored in bfloat16 and in float32, `invariant`", [wide[:0], wide]),
    ):
        print(f"| {what} | {cells(differences)} |")


def _whole_rows(llm, texts):
    """The scores of texts by the forward of a train step, one row each: no pages, no chunks."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxsys.dispatch import dispatcher
    from jaxsys.kernels.attention import Rows

    model, longest = llm.engine.model, max(map(len, texts))
    tokens = np.zeros((len(texts), longest), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    used = np.arange(longest) < np.array([[len(text)] for text in texts])

    @jax.jit
    def forward(params, tokens, segments):
        decoder = model.bind(params)
        positions = jnp.broadcast_to(jnp.arange(longest), tokens.shape)
        logprobs = jax.nn.log_softmax(decoder.logits(decoder(tokens, Rows(segments, positions))[0]))
        return jnp.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], -1)[..., 0]

    params = dict(dispatcher().call(llm.engine.live.lease).params)
    found = np.asarray(forward(params, jnp.asarray(tokens), jnp.asarray(used.astype(np.int32))))
    return [row[: len(text) - 1] for row, text in zip(found, texts, strict=True)]


if __name__ == "__main__":
    main()
