"""The sampler against numpy, and against the distributions that it claims."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.serve.sampler import Settings, _restrict, log_probability, sample

jitted = jax.jit(sample)


def many(rows, temperature=1.0, top_k=0, top_p=1.0, seeds=None):
    seeds = np.zeros(rows) if seeds is None else seeds
    return Settings(
        np.full(rows, temperature, np.float32),
        np.full(rows, top_k, np.int32),
        np.full(rows, top_p, np.float32),
        np.asarray(seeds, np.uint32),
    )


def draw(logits, n=4000, **options):
    """Frequencies [V] of n draws, each of another position."""
    rows = np.tile(np.asarray(logits, np.float32), (n, 1))
    tokens = jitted(rows, many(n, **options), np.arange(n, dtype=np.int32))
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / n


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x))
    return e / e.sum()


LOGITS = [2.0, 1.0, 0.0, 1.5, -1.0, -30.0]


def test_temperature_zero_takes_the_first_of_the_largest():
    logits = np.array([[0, 3, 3, 1], [5, 0, 0, 5]], np.float32)
    tokens = jitted(logits, many(2, temperature=0.0, top_k=2, top_p=0.5), np.zeros(2, np.int32))
    assert tokens.tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax_at_the_temperature(temperature):
    expected = softmax(np.array(LOGITS) / temperature)
    np.testing.assert_allclose(draw(LOGITS, temperature=temperature), expected, atol=0.03)


def test_top_k_renormalises_over_the_k_largest():
    expected = softmax([2.0, -np.inf, -np.inf, 1.5, -np.inf, -np.inf])
    np.testing.assert_allclose(draw(LOGITS, top_k=2), expected, atol=0.03)


def test_top_p_renormalises_over_the_fewest_that_reach_it():
    expected = softmax([2.0, -np.inf, -np.inf, 1.5, -np.inf, -np.inf])  # 0.49 + 0.30 reach 0.7
    np.testing.assert_allclose(draw(LOGITS, top_p=0.7), expected, atol=0.03)


@pytest.mark.parametrize("top_p", [1e-45, 1e-60, 1e-30])
def test_a_tiny_top_p_keeps_the_most_likely_token(top_p):
    assert draw([0.0, 1.0, 3.0, 2.0], n=50, top_p=top_p)[2] == 1


def test_a_tiny_temperature_is_greedy_and_not_nan():
    assert draw([1e4, 1e4 + 1, -1e4], temperature=1e-30)[1] == 1


def restrict_oracle(scaled, k, p):
    kept = np.array(scaled, np.float64)
    if k:
        kept[kept < np.sort(kept)[::-1][min(k, len(kept)) - 1]] = -np.inf
    if p < 1:
        probability = softmax(kept)
        order = np.argsort(-probability, kind="stable")
        enough = np.searchsorted(np.cumsum(probability[order]), p)
        kept[kept < kept[order[min(enough, len(order) - 1)]]] = -np.inf
    return np.isfinite(kept)


restrict = jax.jit(_restrict)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.floats(0.015625, 1.0, width=32))
def test_the_kept_tokens_are_those_of_a_sort(seed, k, p):
    rng = np.random.default_rng(seed)
    scaled = (rng.standard_normal((1, 10)) * rng.uniform(0.1, 10)).astype(np.float32)
    scaled -= scaled.max()
    cumulative = np.cumsum(np.sort(softmax(np.where(restrict_oracle(scaled[0], k, 1.0), scaled[0], -np.inf)))[::-1])
    if p < 1 and np.abs(cumulative - p).min() < 1e-5:
        return  # rounding decides
    found = np.isfinite(np.asarray(restrict(scaled, many(1, top_k=k, top_p=p))))[0]
    np.testing.assert_array_equal(found, restrict_oracle(scaled[0], k, np.float32(p)))


def test_equal_tokens_at_the_edge_are_all_kept():
    found = restrict(np.zeros((1, 5), np.float32), many(1, top_k=2))
    assert np.isfinite(np.asarray(found)).all()


def test_same_seed_and_position_give_the_same_token_in_any_row_beside_anything():
    rng = np.random.default_rng(0)
    row = rng.standard_normal((1, 50)).astype(np.float32)
    alone = jitted(row, many(1, seeds=[9]), np.array([33], np.int32))
    for at in range(4):
        logits = rng.standard_normal((4, 50)).astype(np.float32)
        logits[at] = row
        mixed = Settings(
            np.array([0.0, 0.5, 2.0, 1.0], np.float32), np.array([0, 3, 0, 9], np.int32),
            np.array([1, 1, 0.5, 0.9], np.float32), rng.integers(0, 99, 4).astype(np.uint32),
        )  # fmt: skip
        own = Settings(*(np.array(v) for v in (mixed.temperature, mixed.top_k, mixed.top_p, mixed.seed)))
        own.temperature[at], own.top_k[at], own.top_p[at], own.seed[at] = 1.0, 0, 1.0, 9
        positions = rng.integers(0, 99, 4).astype(np.int32)
        positions[at] = 33
        assert jitted(logits, own, positions)[at] == alone[0]


def test_seeds_and_positions_change_the_draw():
    logits = np.zeros((1, 1000), np.float32)
    tokens = {
        int(jitted(logits, many(1, seeds=[seed]), np.array([position], np.int32))[0])
        for seed in range(4)
        for position in range(4)
    }
    assert len(tokens) > 12


def test_padded_vocabulary_is_never_drawn_and_spoils_no_logprob():
    logits = np.array([[0.0, 1.0, -np.inf]], np.float32)
    assert draw(logits[0], temperature=50.0)[2] == 0
    np.testing.assert_allclose(
        log_probability(logits, np.array([1], np.int32)), np.log(softmax([0.0, 1.0]))[1:], atol=1e-6
    )
