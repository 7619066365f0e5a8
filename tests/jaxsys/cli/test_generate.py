"""What ``jaxsys generate`` makes of its options, with a model that compiles nothing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import jaxsys.llm
from jaxsys.cli.main import main
from jaxsys.serve.request import Result
from jaxsys.serve.sampling import Sampling

PROMPTS = ["--prompt", "abc", "--prompt", "xyz"]


@pytest.fixture
def asked(monkeypatch):
    """Of what ``load`` and ``submit`` were called with; the model says each prompt backwards."""
    asked = SimpleNamespace(load=None, submit=None)

    def load(model, mesh="", dtype="float32", max_context=None, numerics="fast", say=None):
        asked.load = {"model": model, "mesh": mesh, "dtype": dtype, "max_context": max_context, "numerics": numerics}
        return SimpleNamespace(
            engine=SimpleNamespace(graphs=[]),
            tokenizer=SimpleNamespace(eos_ids=(7,)),
            submit=submit,
            pieces=lambda request: iter(request.text),
            result=lambda r: Result(r.text, [1, 2], np.zeros(2, np.float32), [0], "length", [0, 0]),
        )

    def submit(prompts, sampling, chat):
        asked.submit = {"prompts": prompts, "sampling": sampling, "chat": chat}
        return [SimpleNamespace(text=prompt[::-1], made=len(prompt)) for prompt in prompts]

    monkeypatch.setattr(jaxsys.llm, "load", load)
    return asked


def test_every_option_reaches_the_model(asked):
    words = (
        "--mesh tensor=2 --dtype bfloat16 --max-context 99 --numerics invariant --max-tokens 5 --temperature 0.5 "
        "--top-k 3 --top-p 0.75 --seed 11 --chat"
    )
    assert main(["generate", "--model", "some", *PROMPTS, *words.split()]) == 0
    assert asked.load == {
        "model": "some", "mesh": "tensor=2", "dtype": "bfloat16", "max_context": 99, "numerics": "invariant",
    }  # fmt: skip
    assert asked.submit == {
        "prompts": ("abc", "xyz"), "sampling": Sampling(5, 0.5, 3, 0.75, 11, (7,)), "chat": True,
    }  # fmt: skip


def test_without_options_the_defaults_do(asked):
    assert main(["generate", "--model", "some", *PROMPTS]) == 0
    assert asked.load == {"model": "some", "mesh": "", "dtype": "float32", "max_context": None, "numerics": "fast"}
    assert asked.submit["sampling"] == Sampling(128, 1.0, 0, 1.0, None, (7,)) and not asked.submit["chat"]


def test_texts_come_in_order_a_line_each(asked, capsys):
    main(["generate", "--model", "some", *PROMPTS])
    assert capsys.readouterr().out == "cba\nzyx\n"


def test_json_is_one_object_a_line(asked, capsys):
    main(["generate", "--model", "some", *PROMPTS, "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(values) for values in found] == [{"prompt", "text", "tokens", "logprobs", "finish_reason"}] * 2
    assert [values["text"] for values in found] == ["cba", "zyx"]


@pytest.mark.parametrize(
    ("prompts", "words"), [([], "found no --prompt"), (["--prompt", "a", "--prompt", ""], "--prompt 2 of 2 is empty")]
)
def test_prompts_are_looked_at_before_the_model_is_loaded(asked, capsys, prompts, words):
    assert main(["generate", "--model", "some", *prompts]) == 2
    assert words in capsys.readouterr().err and asked.load is None
