"""Texts that end, characters of several tokens, many choices: what comes is the same whole or streamed."""

import itertools

import pytest

from jaxsys.serve.answers import spell

E_ACUTE = "é"  # two bytes, so two tokens


@pytest.fixture(scope="module")
def ids(llm):
    """Token ids by text."""
    return {text: llm.tokenizer.encode(text) for text in ("a", "b", "x", E_ACUTE, "</s>")}


def both(client, **body):
    """The choices of a completion: whole, and what a stream of the same adds up to; texts of its pieces in order."""
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 24, "seed": 3} | body
    whole = client.completions.create(**body).choices
    pieces = [[] for _ in whole]
    for chunk in client.completions.create(stream=True, **body):
        (choice,) = chunk.choices
        pieces[choice.index].append(choice)
    for choice, streamed in zip(whole, pieces, strict=True):
        assert "".join(piece.text for piece in streamed) == choice.text
        assert [piece.finish_reason for piece in streamed if piece.finish_reason] == [choice.finish_reason]
        if choice.logprobs is not None:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                parts = [getattr(piece.logprobs, name) for piece in streamed]
                expected = getattr(choice.logprobs, name)
                assert (None if expected is None else [*itertools.chain(*parts)]) == expected, name
    return whole, [[piece.text for piece in streamed] for streamed in pieces]


def extra(**body):
    """Fields that OpenAI's client does not know."""
    return {"extra_body": body}


def test_a_character_of_two_tokens_is_never_cut(server, client, llm, ids):
    first, second = ids[E_ACUTE]
    wanted = extra(allowed_token_ids=[first, second, *ids["x"]])
    whole, pieces = both(client, n=4, logprobs=1, max_tokens=40, **wanted)
    assert sum(choice.text.count(E_ACUTE) for choice in whole) > 4
    for choice, texts in zip(whole, pieces, strict=True):
        assert set(choice.text) <= {E_ACUTE, "x", "\N{REPLACEMENT CHARACTER}"}
        assert sum(text.count(E_ACUTE) for text in texts) == choice.text.count(E_ACUTE)
        assert set(choice.logprobs.tokens) <= {"bytes:\\xc3", "bytes:\\xa9", "x"}
    assert spell(llm.tokenizer, first) == "bytes:\\xc3"


def test_a_stop_of_several_tokens_ends_the_text_before_it(server, client, ids):
    wanted = extra(allowed_token_ids=[*ids[E_ACUTE], *ids["x"]])
    (free,), _ = both(client, max_tokens=60, **wanted)
    (choice,), pieces = both(client, max_tokens=60, stop=["never", E_ACUTE], **wanted)
    assert E_ACUTE in free.text
    assert (choice.text, choice.finish_reason) == (free.text[: free.text.index(E_ACUTE)], "stop")
    assert len(pieces[0]) > 1


def test_what_only_began_like_a_stop_is_given_at_the_end(server, client, ids):
    (choice,), _ = both(client, max_tokens=5, stop=["aab"], **extra(allowed_token_ids=ids["a"]))
    assert (choice.text, choice.finish_reason) == ("aaaaa", "length")


def test_nothing_ends_a_text_before_its_least_tokens(server, client, ids):
    only = {"allowed_token_ids": ids["a"]}
    (choice,), _ = both(client, stop=["a"], **extra(**only, min_tokens=7))
    assert (choice.text, choice.finish_reason) == ("a" * 6, "stop")
    either = {"allowed_token_ids": [*ids["a"], *ids["</s>"]], "min_tokens": 7}
    whole, _ = both(client, n=8, **extra(**either))
    assert {choice.text[:7] for choice in whole} == {"a" * 7}
    assert {choice.finish_reason for choice in whole} == {"stop"}


def test_a_stop_token_is_counted_and_ends_the_text(server, http, ids):
    body = {"model": "tiny", "prompt": "abc", "allowed_token_ids": ids["b"], "stop_token_ids": ids["b"]}
    done = http.post("/v1/completions", json={**body, "return_token_ids": True}).json()
    (choice,) = done["choices"]
    assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == ("b", ids["b"], "stop")
    assert done["usage"]["completion_tokens"] == 1
    body = {"model": "tiny", "prompt": "abc", "allowed_token_ids": ids["</s>"]}
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")  # special tokens are no text
    (choice,) = http.post("/v1/completions", json={**body, "ignore_eos": True}).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")


@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_an_echo_is_the_same_streamed(server, client, logprobs):
    whole, _ = both(client, prompt=["hé", "abc"], n=2, echo=True, logprobs=logprobs, **extra(ignore_eos=True))
    assert [choice.text[:2] for choice in whole] == ["hé", "hé", "ab", "ab"]
    if logprobs is not None:
        assert whole[0].logprobs.text_offset[:4] == [0, 1, 1, 2]
        assert {choice.logprobs.token_logprobs[0] for choice in whole} == {None}
        assert {len(choice.logprobs.tokens) for choice in whole} == {3 + 24}


def test_the_usage_counts_each_prompt_once_and_what_was_known_already_too(server, http):
    def reused():
        (line,) = [
            each
            for each in http.get("/metrics").text.splitlines()
            if each.startswith("jaxsys_prompt_tokens_reused_total ")
        ]
        return float(line.split()[1])

    body = {"model": "tiny", "prompt": ["a prompt of many tokens"] * 2, "n": 3, "max_tokens": 5, "ignore_eos": True}
    usages = []
    for _ in range(2):
        usages.append(http.post("/v1/completions", json=body).json()["usage"])
        server.idle()
    assert usages[0] == usages[1] == {"prompt_tokens": 46, "completion_tokens": 30, "total_tokens": 76}
    assert reused() > 46


def test_choices_of_a_chat_each_begin_and_end_once_in_a_stream(server, client):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "n": 3, "seed": 1, "max_tokens": 9}
    whole = client.chat.completions.create(**body).choices
    roles, ends, texts = ({i: [] for i in range(3)} for _ in range(3))
    for chunk in client.chat.completions.create(stream=True, **body):
        (choice,) = chunk.choices
        roles[choice.index].append(choice.delta.role)
        ends[choice.index].append(choice.finish_reason)
        texts[choice.index].append(choice.delta.content or "")
    for choice in whole:
        assert [role for role in roles[choice.index] if role] == ["assistant"]
        assert [end for end in ends[choice.index] if end] == [choice.finish_reason]
        assert "".join(texts[choice.index]) == choice.message.content


def test_settings_as_far_as_they_go_give_allowed_tokens_and_finite_numbers(server, http, ids):
    allowed = [*ids["a"], *ids["b"], *ids["x"]]
    far = [
        {"temperature": 1e6},
        {"temperature": 1e-300},
        {"repetition_penalty": 1e6},
        {"repetition_penalty": 1e-6},
        {"presence_penalty": 1e6, "frequency_penalty": -1e6},
        {"presence_penalty": -1e6, "frequency_penalty": 1e6},
        {"logit_bias": {str(token): bias for token, bias in zip(allowed, (100, -100, 100), strict=True)}},
        {"top_p": 1e-300, "min_p": 1.0, "top_k": 2**31 - 1},
    ]
    for settings in far:
        body = {"model": "tiny", "prompt": "abx", "max_tokens": 30, "allowed_token_ids": allowed, "logprobs": 1}
        answer = http.post("/v1/completions", json={**body, "processed_logprobs": True, **settings})
        assert answer.status_code == 200, (settings, answer.text)
        (choice,) = answer.json()["choices"]
        assert set(choice["text"]) <= set("abx"), settings
        assert all(logprob <= 0 for logprob in choice["logprobs"]["processed_token_logprobs"]), settings


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "cannot render these messages: roles must alternate"),
        ("{{ messages[0].content // 2 }}", "cannot render these messages: unsupported operand"),
        ("{{ 1 // 0 }}", "cannot render these messages: integer division or modulo by zero"),
        (None, "has no chat template; give a plain prompt"),
    ],
)
def test_a_template_that_fails_is_said(server, http, llm, monkeypatch, template, says):
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    messages = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = http.post(path, json=messages)
        assert answer.status_code == 400
        assert says in answer.json()["error"]["message"]


def test_a_text_that_is_no_unicode_is_refused(server, http):
    lone = b'"\\ud800"'
    for path, body in (
        ("/v1/completions", b'{"model": "tiny", "prompt": ["a", %b]}'),
        ("/v1/chat/completions", b'{"model": "tiny", "messages": [{"role": "user", "content": %b}]}'),
        ("/tokenize", b'{"prompt": %b}'),
    ):
        answer = http.post(path, content=body % lone)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    body = b'{"model": "tiny", "prompt": "a", "user": %b, "stop": %b, "max_tokens": 1}' % (lone, lone)
    assert http.post("/v1/completions", content=body).status_code == 200
