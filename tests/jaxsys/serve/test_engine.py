"""The engine against the whole forward of whole rows."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from serve_engines import CONFIG, SIZES, WINDOWED, Reference, make_engine, weights
from tiny_models import x64

from jaxsys.graphs import Graphs, LateCompileError, no_compiles
from jaxsys.live import Live
from jaxsys.models.config import Experts, ModelConfig
from jaxsys.models.state import build
from jaxsys.serve import engine as engine_module
from jaxsys.serve.engine import ALIKE, ONE, Engine, EngineConfig, sizes_of
from jaxsys.serve.forward import make_forward
from jaxsys.serve.pages import Pages
from jaxsys.serve.sampling import Sampling
from jaxsys.serve.scheduler import Size
from parallelism import MeshSpec
from parallelism.collectives import collectives
from parallelism.errors import UserError

GREEDY = Sampling(max_tokens=12, temperature=0.0)
PROMPTS = [[5], [1, 2, 3], list(range(20, 37)), list(range(50)), [7] * 9, [96, 0, 96]]


def run(engine, prompts, sampling=GREEDY, score=False):
    sampling = dataclasses.replace(sampling, prompt_logprobs=score)
    requests = [engine.add_request(prompt, sampling) for prompt in prompts]
    engine.run(requests)
    return requests


def made(request):
    return request.tokens[request.prompt_tokens :]


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_decode_equals_the_full_forward(engine, reference, prompt):
    tokens, logprobs = reference.greedy(prompt, 12)
    (request,) = run(engine, [prompt])
    assert made(request) == tokens
    np.testing.assert_allclose(request.logprobs, logprobs, atol=1e-5)
    assert request.finish_reason == "length"


def test_logprobs_are_the_models_own_whatever_the_sampling_settings(engine, reference):
    sampling = Sampling(max_tokens=8, temperature=0.6, top_k=3, top_p=0.9, seed=1)
    (request,) = run(engine, [PROMPTS[1]], sampling)
    expected = reference.log_softmax(request.tokens)[np.arange(2, 10), made(request)]
    np.testing.assert_allclose(request.logprobs, expected, atol=1e-5)
    assert made(request) != reference.greedy(PROMPTS[1], 8)[0]


def test_requests_batched_equal_each_alone(engine):
    alone = [run(engine, [prompt])[0] for prompt in PROMPTS]
    together = run(engine, PROMPTS)
    for a, b in zip(alone, together, strict=True):
        assert made(a) == made(b)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_request_that_arrives_later_equals_itself_alone(engine):
    alone = [made(request) for request in run(engine, PROMPTS[2:4])]
    first = engine.add_request(PROMPTS[2], GREEDY)
    engine.step()
    engine.step()
    second = engine.add_request(PROMPTS[3], GREEDY)
    engine.run([first, second])
    assert [made(first), made(second)] == alone


def test_chunked_prefill_equals_whole_prefill(engine):
    whole = make_engine(sizes=(Size(64, 4, queries=8),))
    (a,), (b,) = run(engine, [PROMPTS[3]], score=True), run(whole, [PROMPTS[3]], score=True)
    assert made(a) == made(b)
    np.testing.assert_allclose(a.prompt_logprobs, b.prompt_logprobs, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_fewer_device_steps_make_the_same_tokens(engine, steps):
    for sampling in (GREEDY, Sampling(12, seed=4)):
        many = run(engine, PROMPTS[:3], sampling)
        few = [engine.add_request(prompt, sampling) for prompt in PROMPTS[:3]]
        while engine.busy:
            engine.step(steps)
        assert [made(r) for r in few] == [made(r) for r in many]


def test_steps_are_data_that_the_device_obeys(engine):
    request = engine.add_request([5], dataclasses.replace(GREEDY, max_tokens=20))
    counts = []
    for steps in (1, 3, None):
        engine.step(steps)
        counts.append(request.made)
    engine.cancel(request)
    assert counts == [1, 4, 12]


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 2.5}], ids=str)
def test_the_same_seed_gives_the_same_tokens_whatever_else_runs(engine, settings):
    sampling = Sampling(12, **{"seed": 3, **settings})
    (alone,) = run(engine, [PROMPTS[1]], sampling)
    others = [engine.add_request(p, Sampling(9, seed=i, top_k=i)) for i, p in enumerate(PROMPTS[2:4])]
    request = engine.add_request(PROMPTS[1], sampling)
    engine.run([request, *others])
    assert made(request) == made(alone)


def test_other_seeds_and_no_seed_give_other_tokens(engine):
    found = {tuple(made(run(engine, [[5]], Sampling(12, seed=seed))[0])) for seed in (1, 2, None, None)}
    assert len(found) == 4


def test_a_stop_token_ends_the_text_and_is_its_last(engine, reference):
    tokens, _ = reference.greedy(PROMPTS[1], 12)
    stop = tokens[4]
    expected = tokens[: tokens.index(stop) + 1]
    (request,) = run(engine, [PROMPTS[1]], dataclasses.replace(GREEDY, stop=(stop,)))
    assert (made(request), request.finish_reason) == (expected, "stop")


def test_more_stop_tokens_than_the_device_looks_for_all_stop(engine, reference):
    tokens, _ = reference.greedy(PROMPTS[1], 12)
    unused = [t for t in range(97) if t not in tokens][:12]
    expected = tokens[: tokens.index(tokens[4]) + 1]
    (request,) = run(engine, [PROMPTS[1]], dataclasses.replace(GREEDY, stop=(*unused, tokens[4])))
    assert made(request) == expected


def test_a_stop_token_brings_the_device_back_at_once(engine, reference):
    tokens, _ = reference.greedy([5], 12)
    request = engine.add_request([5], dataclasses.replace(GREEDY, stop=(tokens[1],)))
    other = engine.add_request([6], dataclasses.replace(GREEDY, max_tokens=30))
    engine.step()
    engine.cancel(other)
    assert request.finish_reason == "stop"
    assert other.made <= 2


def test_max_tokens_is_cut_at_the_end_of_the_context(engine, reference):
    prompt = list(range(90))
    (request,) = run(engine, [prompt], dataclasses.replace(GREEDY, max_tokens=50))
    assert made(request) == reference.greedy(prompt, 6)[0]
    assert request.finish_reason == "length"


def test_score_equals_the_log_softmax_of_the_full_forward(engine, reference):
    sequences = [*PROMPTS, list(range(96))]
    for sequence, request in zip(sequences, run(engine, sequences, Sampling(0), score=True), strict=True):
        expected = reference.log_softmax(sequence)[np.arange(len(sequence) - 1), sequence[1:]]
        np.testing.assert_allclose(request.prompt_logprobs, expected, atol=1e-5)
        assert made(request) == []


def test_scores_of_a_prompt_come_with_its_continuation(engine, reference):
    generated, scored = run(engine, [PROMPTS[2]], score=True), run(engine, [PROMPTS[2]], Sampling(0), score=True)
    assert made(generated[0]) == reference.greedy(PROMPTS[2], 12)[0]
    np.testing.assert_allclose(generated[0].prompt_logprobs, scored[0].prompt_logprobs, atol=1e-6)


def test_a_stream_gives_the_tokens_in_order_and_closed_early_frees_its_pages(engine):
    (whole,) = run(engine, [PROMPTS[1]])
    assert list(engine.stream(engine.add_request(PROMPTS[1], GREEDY), 2)) == made(whole)
    tokens = engine.stream(engine.add_request(PROMPTS[1], GREEDY))
    assert next(tokens) == made(whole)[0]
    tokens.close()
    assert not engine.busy


def test_after_warm_up_nothing_is_compiled_and_a_late_compile_raises(engine):
    run(engine, PROMPTS, score=True)
    with no_compiles("serving"):
        run(engine, PROMPTS, Sampling(5, top_k=3, top_p=0.7, seed=1), score=True)
    with pytest.raises(LateCompileError):
        engine.graphs.compile("late", make_forward(engine.model, SIZES[0], 4, "fast"), 1, 2, 3)


def test_warming_runs_every_program_and_leaves_nothing_behind(engine):
    other = make_engine()
    assert other.cold
    run(other, [PROMPTS[1]])  # what runs is warm, and stays in the middle of what is not
    calls, pages = [], other.scheduler.pages[0].free
    for size, graph in list(other._forward.items()):
        other._forward[size] = lambda *args, size=size, graph=graph: (calls.append(size), graph(*args))[1]
    cold = list(other._cold)
    with no_compiles("warming"):
        while other.cold:
            other.warm()
    assert calls == cold and 0 < len(cold) < len(other.sizes)
    assert other.scheduler.pages[0].free == pages and not other.busy
    assert [made(r) for r in run(other, PROMPTS)] == [made(r) for r in run(engine, PROMPTS)]


def test_the_pool_is_donated_and_never_copied(engine):
    pool = sum(np.asarray(a).nbytes for a in engine.pool.__dict__.values())
    for size in SIZES:
        stats = engine._forward[size].stats
        assert stats.aliased_bytes >= pool
    addresses = [a.unsafe_buffer_pointer() for a in (engine.pool.k, engine.pool.v)]
    run(engine, PROMPTS)
    assert [a.unsafe_buffer_pointer() for a in (engine.pool.k, engine.pool.v)] == addresses


def test_nothing_is_read_that_the_sequence_did_not_write():
    engine = make_engine()
    expected = [made(request) for request in run(engine, PROMPTS)]
    engine.pool = jax.tree.map(lambda a: jax.device_put(np.full(a.shape, np.nan, a.dtype), a.sharding), engine.pool)
    engine.scheduler.pages = (Pages(engine.scheduler.pages[0].count, 8),)  # nothing of before is used again
    assert [made(request) for request in run(engine, PROMPTS)] == expected


def test_tokens_carry_the_version_of_the_weights_that_made_them(reference):
    engine = make_engine(sizes=SIZES[:1])
    request = engine.add_request([5], dataclasses.replace(GREEDY, max_tokens=8))
    engine.step(3)
    params = engine.live._lease.params
    engine.live.publish({key: jax.device_put(np.asarray(a) * 1.5, a.sharding) for key, a in params.items()})
    with no_compiles("a swap"):
        engine.run([request])
    assert request.versions == [0] * 3 + [1] * 5
    assert made(request)[:3] == reference.greedy([5], 3)[0]
    assert made(request) != reference.greedy([5], 8)[0]


def test_a_view_of_the_trainers_weights_is_served():
    model = build(CONFIG)
    graphs = Graphs()
    live = Live({k: jax.device_put(weights(CONFIG)[k]) for k in model.layout}, graphs)
    view = live.view("serve", dict.fromkeys(model.layout, "bfloat16"))
    config = EngineConfig(sizes=SIZES[2:], page_size=8, kv_bytes=1 << 20)
    engine = Engine(build(CONFIG, dtype="bfloat16"), live, graphs, config, view=view)
    direct = make_engine(dtype="bfloat16", sizes=SIZES[2:])
    for a, b in zip(run(engine, PROMPTS), run(direct, PROMPTS), strict=True):
        assert made(a) == made(b)


def test_engines_that_share_a_registry_keep_their_own_pool_and_steps():
    """What a pool or a forward is made for shows in no argument of its graph."""
    graphs, model = Graphs(), build(CONFIG)
    live = Live({key: jax.device_put(weights(CONFIG)[key]) for key in model.layout}, graphs)
    short, long = (
        Engine(model, live, graphs, EngineConfig(context, page_size=8, max_steps=steps, sizes=SIZES[2:]))
        for context, steps in ((8, 2), (96, 8))
    )
    assert short.pool.k.shape != long.pool.k.shape
    direct = make_engine(sizes=SIZES[2:])
    assert [made(r) for r in run(long, PROMPTS)] == [made(r) for r in run(direct, PROMPTS)]


def test_models_of_equal_shapes_that_share_a_registry_run_their_own_forward():
    other = dataclasses.replace(CONFIG, rope_theta=100.0)
    graphs, model = Graphs(), build(CONFIG)
    live = Live({key: jax.device_put(weights(CONFIG)[key]) for key in model.layout}, graphs)
    config = EngineConfig(page_size=8, kv_bytes=1 << 20, sizes=SIZES[2:])
    Engine(model, live, graphs, config)
    (request,) = run(Engine(build(other), live, graphs, config), PROMPTS[2:3])
    assert made(request) == Reference(other).greedy(PROMPTS[2], 12)[0]


def test_local_windows_soft_caps_and_post_norms_decode_as_the_full_forward():
    reference, engine = Reference(WINDOWED), make_engine(WINDOWED, sizes=SIZES[1:])
    for prompt, request in zip(PROMPTS, run(engine, PROMPTS), strict=True):
        tokens, logprobs = reference.greedy(prompt, 12)
        assert made(request) == tokens
        np.testing.assert_allclose(request.logprobs, logprobs, atol=1e-5)


def test_stacked_layers_make_the_same_tokens(engine):
    stacked = make_engine(storage="stacked", sizes=SIZES[2:])
    for a, b in zip(run(engine, PROMPTS), run(stacked, PROMPTS), strict=True):
        assert made(a) == made(b)


NINE_THREE = dataclasses.replace(CONFIG, n_heads=9, n_kv_heads=3)  # divides over neither mesh, 97 tokens neither


@functools.cache
def on_one_device():
    return run(make_engine(NINE_THREE, sizes=SIZES[2:]), PROMPTS, score=True)


@pytest.mark.parametrize(("mesh", "replicas"), [("tensor=2", 1), ("fsdp=2,tensor=2", 2), ("data=2", 2)])
def test_a_mesh_makes_the_tokens_of_one_device_with_its_pool_split_by_replicas_and_heads(mesh, replicas):
    engine = make_engine(NINE_THREE, mesh=mesh, sizes=SIZES[2:])
    heads = 4 if "tensor" in mesh else 3
    assert (engine.pool.k.shape[0], engine.pool.k.shape[3]) == (replicas, heads)
    split = {(shard.data.shape[0], shard.data.shape[3]) for shard in engine.pool.k.addressable_shards}
    assert split == {(1, 2 if "tensor" in mesh else 3)}
    requests = run(engine, PROMPTS, score=True)
    assert {request.replica for request in requests} == set(range(replicas))
    for a, b in zip(on_one_device(), requests, strict=True):
        assert made(a) == made(b)
        np.testing.assert_allclose(a.prompt_logprobs, b.prompt_logprobs, atol=1e-5)


def test_replicas_send_each_other_nothing_of_their_keys_and_values():
    engine = make_engine(mesh="data=2", sizes=SIZES[2:], page_size=64)
    (forward,) = engine._forward.values()
    read = engine.pool.k[0, 0, 0].nbytes * SIZES[2].sequences  # a page for each sequence, more than their logits
    assert all(each.nbytes < read for each in collectives(forward.text, engine.graphs.mesh))


def test_invariance_is_tried_at_the_start(monkeypatch):
    made = engine_module._made

    def by_row(host, at, chunk):
        out = made(host, at, chunk)
        return out._replace(logprob=out.logprob * (1 + 1e-7 * at[2]))

    monkeypatch.setattr(engine_module, "_made", by_row)
    with pytest.raises(UserError, match="does not hold here: a text continued by 64 rows among others differs in 2 of"):
        make_engine(numerics="invariant", sizes=ONE)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompt", "sampling", "words"),
    [
        ([], GREEDY, "no token"),
        ([1, 97], GREEDY, "token 97 is not in the vocabulary, expected 0 to 96"),
        ([-1], GREEDY, "token -1"),
        ([1], Sampling(1, stop=(97,)), "stop: token 97 is not in the vocabulary, expected 0 to 96"),
        ([1] * 96, GREEDY, "prompt of 96 tokens, expected at most 95 in a context of 96"),
        ([1] * 98, Sampling(0), "prompt of 98 tokens, expected at most 97"),
        ([1.9], GREEDY, "found 1.9 among its tokens, expected whole numbers"),
        ([1, True], GREEDY, "found True among its tokens"),
        (["1"], GREEDY, "found '1' among its tokens"),
        (b"abc", GREEDY, "found b'abc', expected a list of token ids"),
        (5, GREEDY, "found 5, expected a list of token ids"),
    ],
)
def test_a_bad_prompt_is_refused_in_one_line(engine, prompt, sampling, words):
    with pytest.raises(UserError, match=words) as error:
        engine.add_request(prompt, sampling)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"max_context": 97}, {"max_context": 0}, {"max_context": 96, "kv_bytes": 20_000}])
def test_a_context_that_model_or_pool_do_not_have_is_refused(options):
    with pytest.raises(UserError, match="max_context"):
        make_engine(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_bytes": 100}, "kv_bytes=100, expected at least 4160"),
        ({"kv_bytes": None}, "kv_bytes=None, expected a whole number of at least 1"),
        ({"max_context": "5"}, "max_context='5', expected a whole number of at least 1"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"numerics": 3}, "unknown numerics '3'"),
    ],
)
def test_a_wrong_number_is_named(options, words):
    with pytest.raises(UserError, match=words):
        make_engine(**options)


@pytest.mark.parametrize(("where", "score"), [("embed.kernel", False), ("norm.scale", True)])
def test_weights_that_are_not_finite_are_an_error_and_no_token(where, score):
    engine = make_engine(sizes=SIZES[2:])
    params = dict(engine.live._lease.params)
    engine.live.publish(params | {where: jax.device_put(np.asarray(params[where]) * np.nan, params[where].sharding)})
    request = engine.add_request([1, 2, 3], Sampling(0, prompt_logprobs=True) if score else GREEDY)
    with pytest.raises(UserError, match="the model: its logits are not finite"):
        engine.run([request])
    assert not engine.busy and request.made == 0


def test_the_pool_stays_within_its_bytes_and_shortens_the_context():
    engine = make_engine(kv_bytes=20_000, sizes=(Size(1, 1),))
    assert engine.pool.k.nbytes + engine.pool.v.nbytes <= 20_000
    assert engine.max_context == 64
    assert engine.room == "context 64 of the model's 96: kv_bytes=20000 holds no more; 8 pages of 8"
    assert len(made(run(engine, [[1] * 60], dataclasses.replace(GREEDY, max_tokens=9))[0])) == 4


@pytest.mark.parametrize("options", [{"sizes": SIZES[2:]}, {"numerics": "invariant", "sizes": ONE}], ids=str)
def test_a_process_with_64_bit_types_makes_the_same_tokens(engine, options):
    sampling = Sampling(8, top_k=9, top_p=0.9, seed=1)
    with x64():
        (wide,) = run(make_engine(**options), PROMPTS[2:3], sampling, score=True)
    (expected,) = run(engine, PROMPTS[2:3], sampling, score=True)
    assert made(wide) == made(expected)
    np.testing.assert_allclose(wide.prompt_logprobs, expected.prompt_logprobs, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- numerics


# Just wide enough that programs of several sizes agree.
WIDE = dataclasses.replace(CONFIG, vocab_size=512, d_model=512, n_heads=8, head_dim=64, d_ff=512)


@pytest.mark.parametrize(
    ("config", "dtype", "mesh", "sizes"),
    [
        (CONFIG, "float32", "", ONE),
        (CONFIG, "bfloat16", "", ONE),
        (CONFIG, "float32", "tensor=2", ONE),
        (WIDE, "float32", "", ALIKE),
    ],
    ids=lambda a: "" if isinstance(a, ModelConfig) else f"{len(a)} sizes" if isinstance(a, tuple) else None,
)
def test_invariant_logprobs_are_bitwise_those_of_the_request_alone_and_of_scoring(config, dtype, mesh, sizes):
    pool = {"page_size": 64, "kv_bytes": 8 << 20} if sizes is ALIKE else {}
    engine = make_engine(config, dtype=dtype, mesh=mesh, numerics="invariant", sizes=sizes, **pool)
    assert engine.scheduler.counts.computed == 0  # of the trial nothing is left
    prompts = [*PROMPTS, list(range(90, 3, -1))]  # the last one is computed in two chunks
    sampling = dataclasses.replace(GREEDY, max_tokens=9, temperature=0.7, seed=3)
    together = [engine.add_request(prompt, dataclasses.replace(sampling, prompt_logprobs=True)) for prompt in prompts]
    engine.run(together)
    for prompt, request in zip(prompts, together, strict=True):
        alone = engine.add_request(prompt, sampling)
        engine.run([alone])
        assert (made(alone), alone.logprobs) == (made(request), request.logprobs)
        scored = engine.add_request(request.tokens, Sampling(0, prompt_logprobs=True))
        engine.run([scored])
        assert scored.prompt_logprobs == request.prompt_logprobs + request.logprobs


def test_invariant_logprobs_are_those_of_the_whole_forward(reference):
    engine = make_engine(numerics="invariant", sizes=ONE)
    for prompt, request in zip(PROMPTS, run(engine, PROMPTS, score=True), strict=True):
        tokens, logprobs = reference.greedy(prompt, 12)
        assert made(request) == tokens
        np.testing.assert_allclose(request.logprobs, logprobs, atol=1e-5)
        expected = reference.log_softmax(prompt)[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(request.prompt_logprobs, expected, atol=1e-5)


def test_invariant_numerics_fall_back_on_one_program_where_several_differ(monkeypatch):
    tried = iter(["they differ", None])
    monkeypatch.setattr(engine_module, "difference", lambda engine, sizes: next(tried))
    engine = make_engine(WIDE, numerics="invariant", sizes=None, page_size=64)
    assert engine.sizes == ONE
    assert [graph.name for graph in engine.graphs if "forward" in graph.name] == ["forward[64x16]"]


@pytest.mark.parametrize(
    "change",
    [
        {"d_model": 511},
        {"vocab_size": 511},
        {"n_heads": 6},
        {"head_dim": 32},
        {"qk_norm": "head"},
        {"experts": Experts(number=4, per_token=2, width=64)},
    ],
    ids=str,
)
def test_several_sizes_are_for_one_device_and_models_with_enough_to_sum(change):
    config = EngineConfig(numerics="invariant")
    assert sizes_of(config, build(WIDE), None) == sizes_of(config, build(WIDE), MeshSpec().build()) == [ALIKE, ONE]
    assert sizes_of(config, build(WIDE), MeshSpec.parse("tensor=2").build()) == [ONE]
    assert sizes_of(EngineConfig(numerics="invariant", page_size=32), build(WIDE), None) == [ONE]
    assert sizes_of(config, build(dataclasses.replace(WIDE, **change)), None) == [ONE]


def test_numerics_that_there_are_not_are_refused():
    with pytest.raises(UserError, match="unknown numerics 'exact'"):
        EngineConfig(numerics="exact")
