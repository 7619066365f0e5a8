"""The trial of ``invariant`` numerics, when an engine starts: do its programs compute a token alike, to the bit?

Log-probabilities alone say little: rounding hides what differs below them. So the keys and values of every layer are
compared too, which hold each bit of the hidden states before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxsys.dispatch import dispatcher
from jaxsys.serve.request import Request
from jaxsys.serve.sampling import Sampling

if TYPE_CHECKING:
    from jaxsys.serve.engine import Engine
    from jaxsys.serve.scheduler import Size

TOKENS, MADE, OTHERS = 72, 2, 5  # of the text that is tried, a page's worth and more; and who runs beside it


def difference(engine: Engine, sizes: Sequence[Size]) -> str | None:
    """What one of the programs computes otherwise than the first does alone, in words; None if nothing.

    A text is continued by the first alone, then by each among others, and scored there.
    """
    vocabulary, room = engine.model.config.vocab_size, engine.max_context
    made = min(MADE, room // 2)
    prompt = [(7919 * i * i + 104_729 * i + 11) % vocabulary for i in range(min(TOKENS, room - made))]
    others = [[(31 * i + k) % vocabulary for k in range(min(1 + 5 * i, room - made))] for i in range(OTHERS)]
    settings = Sampling(made, temperature=0.0, prompt_logprobs=True)
    try:
        engine.schedule_over(sizes[:1])
        alone = engine.add_request(prompt, settings)
        (expected,) = _run(engine, [alone])
        for size in sizes:
            engine.schedule_over([size])
            company = [engine.add_request(each, Sampling(room - len(each), temperature=0.0)) for each in others]
            again = engine.add_request(prompt, settings)
            scored = engine.add_request(alone.tokens, Sampling(max_tokens=0, prompt_logprobs=True))
            for what, found in zip(("continued", "scored"), _run(engine, [again, scored], company), strict=True):
                if where := _where(expected, found):
                    beside = f"by {size.rows} rows among others"
                    return f"a text {what} {beside} differs in {where} from {sizes[0].rows} rows alone"
    finally:
        engine.schedule_over(sizes)
    return None


def _run(engine: Engine, requests: Sequence[Request], others: Sequence[Request] = ()) -> list[list[np.ndarray]]:
    """Of each request: the log-probabilities of its tokens, and its keys and values."""
    pages: dict[Request, list[int]] = {}
    found: dict[Request, list[np.ndarray]] = {}
    while len(found) < len(requests):
        launched = engine.launch()
        assert launched is not None
        pages |= {request: list(request.pages) for request in requests if request.pages}
        engine.finish(launched)
        for request in requests:
            if request.finish_reason is not None and request not in found:
                # Its pages keep what they hold until somebody else needs them. The last token is not computed.
                kept = dispatcher().call(_read, engine, request.replica, pages[request], len(request.tokens) - 1)
                found[request] = [np.array(request.prompt_logprobs + request.logprobs, np.float32), *kept]
    for other in others:
        engine.cancel(other)
    return [found[request] for request in requests]


def _read(engine: Engine, replica: int, pages: Sequence[int], positions: int) -> list[np.ndarray]:
    """Keys and values [L, K, positions, h] of a sequence, as each device of its replica holds them."""
    found = []
    assert engine.pool is not None
    for pool in (engine.pool.k, engine.pool.v):
        for shard in pool.addressable_shards:
            first = shard.index[0].indices(pool.shape[0])[0]
            here = np.asarray(shard.data)
            if first <= replica < first + here.shape[0]:
                held = here[replica - first][:, pages].swapaxes(1, 2)
                found.append(held.reshape(*held.shape[:2], -1, held.shape[-1])[:, :, :positions].copy())
    return found


def _where(expected: list[np.ndarray], found: list[np.ndarray]) -> str | None:
    names = ["log-probabilities", *["keys or values"] * (len(expected) - 1)]
    for name, a, b in zip(names, expected, found, strict=True):
        if not np.array_equal(a, b):
            return f"{np.count_nonzero(a != b):,} of {a.size:,} {name}"
    return None
