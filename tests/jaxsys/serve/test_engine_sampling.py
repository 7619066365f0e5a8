"""Every setting through the engine, against the whole forward and numpy."""

import dataclasses

import numpy as np
import pytest
from serve_engines import make_engine

from jaxsys.serve.engine import ONE
from jaxsys.serve.sampling import ALTERNATIVES, Sampling
from parallelism.errors import UserError

PROMPT = [5, 9, 9, 30]
GREEDY = Sampling(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module", params=["fast", "invariant"])
def engine(request, shared_engine):
    return shared_engine if request.param == "fast" else make_engine(numerics="invariant", sizes=ONE)


def run(engine, sampling, prompt=PROMPT):
    request = engine.add_request(prompt, sampling)
    engine.run([request])
    return request


def expected(reference, change, n=12, prompt=PROMPT):
    """Greedy tokens where ``change(logprobs, tokens so far)`` is applied before each choice."""
    tokens = list(prompt)
    for _ in range(n):
        scores = np.array(reference.log_softmax(tokens)[-1])
        tokens.append(int(np.argmax(change(scores, tokens[len(prompt) :], tokens))))
    return tokens[len(prompt) :]


def made(request):
    return request.tokens[request.prompt_tokens :]


def test_frequency_and_presence_penalties(engine, reference):
    def change(scores, new, every):
        count = np.bincount(new, minlength=len(scores))
        return scores - 0.7 * count - 0.4 * (count > 0)

    found = run(engine, dataclasses.replace(GREEDY, frequency_penalty=0.7, presence_penalty=0.4))
    assert made(found) == expected(reference, change)
    assert made(found) != made(run(engine, GREEDY))
    assert len(found.logprobs) == 12


def test_repetition_penalty_counts_the_prompt(engine, reference):
    """Logits are known only up to a constant from log-probabilities, so the oracle takes the engine's own logits."""
    found = made(run(engine, dataclasses.replace(GREEDY, repetition_penalty=50.0)))
    plain = made(run(engine, GREEDY))
    assert found[0] not in PROMPT
    assert len(set(found)) > len(set(plain))


def test_biased_allowed_and_least_tokens(engine, reference):
    biased = run(engine, dataclasses.replace(GREEDY, logit_bias={3: 4.0, 8: -100.0}))

    def bias(scores, new, every):
        scores[3] += 4
        scores[8] -= 100
        return scores

    assert made(biased) == expected(reference, bias)
    allowed = (2, 40, 64, 96)
    found = run(engine, dataclasses.replace(GREEDY, allowed_tokens=allowed))

    def limit(scores, new, every):
        return np.where(np.isin(np.arange(len(scores)), allowed), scores, -np.inf)

    assert made(found) == expected(reference, limit)
    stop = made(run(engine, GREEDY))[1]
    late = run(engine, dataclasses.replace(GREEDY, stop=(stop,), min_tokens=5))

    def goes_on(scores, new, every):
        if len(new) < 5:
            scores[stop] = -np.inf
        return scores

    tokens = expected(reference, goes_on)
    ends = next((i + 1 for i, token in enumerate(tokens) if token == stop), 12)
    assert made(late) == tokens[:ends]
    assert ends > 5


def test_settings_of_one_request_change_nothing_of_another(engine):
    settings = [
        GREEDY,
        dataclasses.replace(GREEDY, repetition_penalty=3.0),
        dataclasses.replace(GREEDY, logit_bias={3: 9.0}),
        Sampling(12, seed=4, min_p=0.2, presence_penalty=1.0, processed_logprobs=True),
    ]
    alone = [run(engine, each) for each in settings]
    together = [engine.add_request(PROMPT, each) for each in settings]
    engine.run(together)
    assert [made(a) for a in alone] == [made(b) for b in together]


def test_logprobs_of_the_most_likely_raw_and_processed(engine, reference):
    sampling = Sampling(6, temperature=0.5, top_k=4, seed=2, logprobs=5, processed_logprobs=True, prompt_logprobs=True)
    found = run(engine, sampling)
    rows = reference.log_softmax(found.tokens)
    for rows_of, tops in ((rows[3:-1], found.top), (rows[:3], found.prompt_top)):
        assert len(rows_of) == len(tops)
        for row, top in zip(rows_of, tops, strict=True):
            order = np.argsort(-row)[:5]
            assert [token for token, _ in top] == order.tolist()
            np.testing.assert_allclose([p for _, p in top], row[order], atol=1e-5)
    np.testing.assert_allclose(found.prompt_logprobs, rows[np.arange(3), PROMPT[1:]], atol=1e-5)
    for row, token, processed in zip(rows[3:-1], made(found), found.processed, strict=True):
        kept = np.where(row >= np.sort(row)[-4], row / 0.5, -np.inf)
        assert processed == pytest.approx(kept[token] - np.log(np.exp(kept).sum()), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_bias": {97: 1.0}}, "logit_bias: token 97 is not in the vocabulary"),
        ({"allowed_tokens": (4, 200)}, "allowed_tokens: token 200 is not in the vocabulary"),
        ({"stop": (97,)}, "stop: token 97 is not in the vocabulary"),
        ({"logprobs": ALTERNATIVES + 1}, "logprobs=21, expected a whole number from 0 to 20"),
    ],
)
def test_what_cannot_be_honoured_is_refused(engine, settings, message):
    with pytest.raises(UserError, match=message):
        engine.make_request(PROMPT, Sampling(**settings))
