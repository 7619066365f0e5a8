"""The sampler against numpy, and against the distributions that it claims."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.serve.sampler import Settings, _restrict, alternatives, log_probability, processed, sample
from jaxsys.serve.sampling import ALTERNATIVES


@jax.jit
def jitted(logits, settings, positions):
    return sample(logits, settings, positions, False)[0]


def many(rows, **options):
    """Settings of rows that are alike, but for options of an array each."""
    values = {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "repetition": 1.0, "presence": 0.0,
        "frequency": 0.0, "prompt": 0, "ends": 0, "limited": False,
    } | options  # fmt: skip
    whole = {"top_k": np.int32, "prompt": np.int32, "ends": np.int32, "seed": np.uint32, "limited": np.bool_}
    each = {name: np.full(rows, value, whole.get(name, np.float32)) for name, value in values.items()}
    nothing = np.full((rows, 4), -1, np.int32), np.zeros((rows, 4), np.float32), np.zeros((rows, 4), np.uint32)
    return Settings(**each, **dict(zip(("biased", "bias", "allowed"), nothing, strict=True)))


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
    alone = jitted(row, many(1, seed=[9]), np.array([33], np.int32))
    for at in range(4):
        logits = rng.standard_normal((4, 50)).astype(np.float32)
        logits[at] = row
        own = many(
            4, temperature=[0.0, 0.5, 2.0, 1.0], top_k=[0, 3, 0, 9], top_p=[1, 1, 0.5, 0.9], min_p=[0, 0.1, 0, 0.2],
            seed=rng.integers(0, 99, 4),
        )  # fmt: skip
        for name, value in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("seed", 9)):
            getattr(own, name)[at] = value
        positions = rng.integers(0, 99, 4).astype(np.int32)
        positions[at] = 33
        assert jitted(logits, own, positions)[at] == alone[0]


def test_seeds_and_positions_change_the_draw():
    logits = np.zeros((1, 1000), np.float32)
    tokens = {
        int(jitted(logits, many(1, seed=[seed]), np.array([position], np.int32))[0])
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


def test_min_p_keeps_what_is_likely_enough_beside_the_first():
    expected = softmax([2.0, 1.0, -np.inf, 1.5, -np.inf, -np.inf])  # e^-1 = 0.37 of the first; e^-2 = 0.14 is below
    np.testing.assert_allclose(draw(LOGITS, min_p=0.3), expected, atol=0.03)


def adjusted(logits, settings, tokens=(), position=None, stop=(), prompt=0):
    """One row through ``processed``."""
    text = np.array([[*tokens, 0, 0]], np.int32), np.arange(len(tokens) + 2)[None] < len(tokens)
    stops = np.array([[*stop, -1]], np.int32)
    at = np.array([len(tokens) if position is None else position], np.int32)
    settings, logits = jax.tree.map(jnp.asarray, settings), jnp.array([logits], jnp.float32)
    return np.asarray(processed(logits, settings, at, stops, lambda: text))[0]


def test_penalties_follow_what_is_in_the_text():
    """Repetition: of prompt and what was made (Keskar et al. 2019); presence and frequency: of what was made."""
    settings = many(1, repetition=2.0, presence=0.25, frequency=0.5, prompt=2)
    found = adjusted([2.0, -1.0, 3.0, 0.5, 1.0], settings, tokens=[0, 1, 2, 2, 1])
    np.testing.assert_allclose(found, [1.0, -2.0 - 0.75, 1.5 - 1.25, 0.5, 1.0])


def test_biases_are_added():
    settings = many(1)
    settings.biased[0, :2], settings.bias[0, :2] = [3, 1], [5.0, -100.0]
    np.testing.assert_allclose(adjusted([0.0, 1.0, 2.0, 3.0], settings), [0.0, -99.0, 2.0, 8.0])


def test_only_what_is_allowed_is_made():
    settings = many(1, limited=True)
    settings.allowed[0, 0], settings.allowed[0, 1] = 1 << 3 | 1 << 31, 1 << 2
    found = adjusted(np.arange(100.0), settings)
    assert np.flatnonzero(np.isfinite(found)).tolist() == [3, 31, 34]
    np.testing.assert_array_equal(found[[3, 31, 34]], [3, 31, 34])


def test_stop_tokens_wait_for_the_least_number_of_tokens():
    settings = many(1, ends=7)
    assert np.isfinite(adjusted([1.0, 2.0, 3.0], settings, position=6, stop=[2, 0])).tolist() == [False, True, False]
    assert np.isfinite(adjusted([1.0, 2.0, 3.0], settings, position=7, stop=[2, 0])).all()


def test_the_most_likely_tokens_come_with_the_models_own_log_probabilities():
    logits = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    tokens, found = (np.asarray(a) for a in alternatives(logits))
    expected = np.log([softmax(row) for row in logits])
    order = np.argsort(-logits, axis=-1)[:, :ALTERNATIVES]
    np.testing.assert_array_equal(tokens, order)
    np.testing.assert_allclose(found, np.take_along_axis(expected, order, -1), atol=1e-6)
    few, missing = alternatives(logits[:, :5])
    assert few.shape == (3, ALTERNATIVES)
    assert np.isneginf(np.asarray(missing)[:, 5:]).all()


def test_processed_log_probabilities_are_of_the_distribution_that_was_drawn_from():
    rows = np.tile(np.array(LOGITS, np.float32), (64, 1))
    settings = many(64, temperature=0.5, top_k=3)
    tokens, found = sample(rows, settings, np.arange(64, dtype=np.int32), True)
    kept = softmax(np.where(restrict_oracle(np.array(LOGITS), 3, 1.0), np.array(LOGITS) / 0.5, -np.inf))
    np.testing.assert_allclose(found, np.log(kept[np.asarray(tokens)]), atol=1e-6)
    greedy = sample(rows, many(64, temperature=0.0), np.arange(64, dtype=np.int32), True)[1]
    assert not np.asarray(greedy).any()
