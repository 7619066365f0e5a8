"""Under ``invariant`` numerics what the server reports is, to the bit, what scoring the same tokens gives."""

import json
import threading

import httpx
import numpy as np
import pytest
from http_server import CONFIG, SECONDS, make_llm, running

from jaxsys.models.state import build
from jaxsys.serve.engine import ONE
from jaxsys.serve.pool import page_bytes


@pytest.fixture(scope="module")
def invariant():
    """With a pool of few pages, so that requests have to leave it and come back."""
    page = page_bytes(build(CONFIG), 8, np.dtype("float32"))
    return make_llm(numerics="invariant", sizes=ONE, kv_bytes=16 * page)


def reported(http, path: str, body: dict) -> list[tuple[list[int], list[float], list[float]]]:
    """Of each choice: all its tokens, and the log-probabilities of the prompt's (but the first) and of those made."""
    body = {"model": "tiny", "max_tokens": 40, "return_token_ids": True, **body}
    answer = http.post(path, json=body, timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    else:
        chunks = [answer.json()]
    choices = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            tokens, scored, made = choices.setdefault(choice["index"], ([], [], []))
            tokens += choice.get("prompt_token_ids", []) + choice["token_ids"]
            scored += [entry["logprob"] for entry in choice.get("prompt_logprobs", [])[1:]]
            given = choice["logprobs"]
            made += given["token_logprobs"] if "token_logprobs" in given else [e["logprob"] for e in given["content"]]
    return [choices[i] for i in sorted(choices)]


def test_reported_logprobs_are_bitwise_those_of_scoring(invariant):
    """Of calls that run together and make each other leave, and then of calls alone, whose prompts are scored too."""
    text = "a prompt that several have in common, "
    calls = [("/v1/completions", {"prompt": text + "x" * i, "logprobs": 0, "stream": i % 2 == 0}) for i in range(6)]
    mixed = {"prompt": [text[:20], "ab"], "logprobs": 3, "n": 3, "temperature": 0.7, "top_p": 0.8}
    calls += [("/v1/completions", mixed)]
    calls += [("/v1/completions", {"prompt": "abc" * 12, "logprobs": 1, "temperature": 0, "repetition_penalty": 1.3})]
    chat = {"messages": [{"role": "user", "content": text}], "logprobs": True}
    calls += [("/v1/chat/completions", {**chat, "stream": stream, "n": 2}) for stream in (False, True)]
    found = []
    with running(invariant) as server, httpx.Client(base_url=server.address) as http:

        def ask(path, body):
            found.extend(reported(http, path, body))

        threads = [threading.Thread(target=ask, args=call) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for path, body in calls:
            ask(path, {**body, "n": 1, "prompt_logprobs": 0})
    counts = invariant.engine.scheduler.counts
    assert len(found) == (6 + 6 + 1 + 4) + (6 + 2 + 1 + 2)
    assert counts.preempted > 0 and counts.reused > 100
    alone = [invariant.score([tokens])[0] for tokens, _, _ in found]
    for (tokens, scored, made), expected in zip(found, alone, strict=True):
        assert len(made) > 0
        assert made == expected.tolist()[-len(made) :], tokens
        assert scored in ([], expected.tolist()[: -len(made)])
    assert sum(bool(scored) for _, scored, _ in found) == 11
