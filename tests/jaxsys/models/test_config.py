"""The work of a model, counted by hand."""

import dataclasses

import numpy as np

from jaxsys.models.config import ModelConfig

CONFIG = ModelConfig("llama", vocab_size=10, d_model=4, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=2, d_ff=3)


def test_flops_of_a_token_are_those_of_its_matmuls_and_of_the_keys_it_sees():
    q, o, k, v, mlp, head = 4 * 8, 8 * 4, 4 * 4, 4 * 4, 3 * 4 * 3, 10 * 4
    assert CONFIG.matmul_parameters() == 2 * (q + k + v + o + mlp) + head
    # A multiply-add is two operations, backward is twice forward; scores and weighted sum are 8 wide each.
    keys = np.array([1, 2, 3, 4, 5])
    attention = 2 * 3 * 2 * (8 + 8) * keys.mean()
    assert CONFIG.flops_per_token(keys) == 6 * CONFIG.matmul_parameters() + attention


def test_a_window_cuts_the_keys_of_each_token_and_not_their_mean():
    windowed = dataclasses.replace(CONFIG, windows=(2, None))
    keys = np.array([1, 2, 3, 4, 5])
    saved = CONFIG.flops_per_token(keys) - windowed.flops_per_token(keys)
    assert np.isclose(saved, 2 * 3 * (8 + 8) * (0 + 0 + 1 + 2 + 3) / 5)
