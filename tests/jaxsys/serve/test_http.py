"""The server as OpenAI's own client sees it."""

import dataclasses
import gzip
import json
import threading

import httpx
import openai
import pytest
from http_server import SECONDS, Gate

from jaxsys.serve.answers import spell
from jaxsys.serve.sampling import Sampling


@pytest.fixture(scope="module")
def alone(llm):
    """What a prompt comes to, greedily, from Python; made before the server has the engine."""
    settings = {"max_tokens": 12, "temperature": 0.0, "logprobs": 3, "prompt_logprobs": True}
    results = llm.generate(["abc", "hello"], **settings)
    (chat,) = llm.generate([llm.tokenizer.encode("<s>user:hi<s>", add_bos=False)], **settings)
    return {"abc": results[0], "hello": results[1], "chat": chat}


@pytest.fixture(autouse=True, scope="module")
def _in_order(alone, shared):
    """Fixtures of a module are made in this order."""


GREEDY = {"model": "tiny", "max_tokens": 12, "temperature": 0}
HI = [{"role": "user", "content": "hi"}]


def test_a_completion_is_what_python_gives(server, client, alone):
    done = client.completions.create(prompt="abc", **GREEDY)
    (choice,) = done.choices
    assert (choice.text, choice.finish_reason, choice.index) == (alone["abc"].text, "length", 0)
    assert (done.object, done.model) == ("text_completion", "tiny")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (3, 12, 15)
    assert choice.logprobs is None


def test_a_chat_goes_through_the_template(server, client, alone):
    done = client.chat.completions.create(messages=HI, **GREEDY)
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].message.content == alone["chat"].text
    assert done.object == "chat.completion"
    assert done.usage.prompt_tokens == len(alone["chat"].prompt_tokens)


def test_an_answer_can_be_sent_back_and_parts_are_one_text(server, client):
    answer = client.chat.completions.create(messages=HI, **GREEDY).choices[0].message
    more = [*HI, answer.model_dump(), {"role": "user", "content": [{"type": "text", "text": "x"}] * 2}]
    parts = client.chat.completions.create(messages=more, **GREEDY)
    plain = [*HI, {"role": "assistant", "content": answer.content}, {"role": "user", "content": "xx"}]
    assert client.chat.completions.create(messages=plain, **GREEDY).choices[0].message == parts.choices[0].message


def test_a_developers_message_is_the_systems(http):
    def tokens(role):
        messages = [{"role": role, "content": "be brief"}, *HI]
        return http.post("/tokenize", json={"model": "tiny", "messages": messages}).json()["tokens"]

    assert tokens("developer") == tokens("system") != tokens("user")


@pytest.mark.parametrize("shape", ["text", "texts", "ids", "lists"])
def test_a_prompt_is_a_text_texts_ids_or_lists_of_ids(server, client, llm, alone, shape):
    ids = [llm.tokenizer.encode(text) for text in ("abc", "hello")]
    prompt = {"text": "abc", "texts": ["abc", "hello"], "ids": ids[0], "lists": ids}[shape]
    done = client.completions.create(prompt=prompt, **GREEDY)
    texts = [alone["abc"].text, alone["hello"].text]
    assert [choice.text for choice in done.choices] == (texts if shape in ("texts", "lists") else texts[:1])


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_of_completions_adds_up_and_begins_before_the_end(server, client, llm, monkeypatch, n):
    settings = {"model": "tiny", "prompt": ["abc", "x"], "max_tokens": 20, "seed": 5, "n": n, "logprobs": 1}
    whole = client.completions.create(**settings)
    texts, offsets, ends = {}, {}, {}
    gate = Gate(llm.engine, monkeypatch, after=2)  # of the five steps and more that 20 tokens take
    for chunk in client.completions.create(stream=True, **settings):
        gate.open.set()
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        offsets.setdefault(choice.index, []).extend(choice.logprobs.text_offset)
        ends[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert offsets[choice.index] == choice.logprobs.text_offset
        assert ends[choice.index] == choice.finish_reason
    assert len(whole.choices) == 2 * n
    assert gate.reached.is_set()


def test_a_stream_of_a_chat_adds_up_and_ends_with_the_usage(server, client):
    settings = {"model": "tiny", "messages": HI, "max_completion_tokens": 20, "seed": 5, "logprobs": True}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **settings))
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.choices[0].message.content
    entries = [entry for p in pieces for entry in p.choices[0].logprobs.content]
    assert entries == whole.choices[0].logprobs.content
    assert [p.choices[0].finish_reason for p in pieces][-1] == whole.choices[0].finish_reason
    assert {p.usage for p in pieces} == {None}
    assert (last.choices, last.usage) == ([], whole.usage)


def test_choices_of_one_prompt_differ_and_their_seeds_follow_each_other(server, client):
    settings = {"model": "tiny", "prompt": "abc", "max_tokens": 12}
    choices = client.completions.create(seed=7, n=3, **settings).choices
    assert len({choice.text for choice in choices}) == 3
    alone = [client.completions.create(seed=7 + i, **settings).choices[0].text for i in range(3)]
    assert alone == [choice.text for choice in choices]


def test_logprobs_of_a_completion_are_the_models(server, client, llm, alone):
    result = alone["abc"]
    logprobs = client.completions.create(prompt="abc", logprobs=2, **GREEDY).choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx(result.logprobs.tolist(), abs=1e-5)
    assert logprobs.tokens == [spell(llm.tokenizer, token) for token in result.tokens]
    for given, top in zip(logprobs.top_logprobs, result.top_logprobs, strict=True):
        assert list(given) == [spell(llm.tokenizer, token) for token, _ in top[:2]]
        assert list(given.values()) == pytest.approx([logprob for _, logprob in top[:2]], abs=1e-5)
    assert logprobs.text_offset[0] == 0


def test_echo_gives_the_prompt_and_its_logprobs(server, client, alone):
    (choice,) = client.completions.create(prompt="abc", echo=True, logprobs=0, **GREEDY).choices
    assert choice.text == "abc" + alone["abc"].text
    scores = [None, *alone["abc"].prompt_logprobs.tolist(), *alone["abc"].logprobs.tolist()]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(scores[1:], abs=1e-5)
    assert choice.logprobs.text_offset[:4] == [0, 1, 2, 3]
    assert choice.logprobs.tokens[:3] == ["a", "b", "c"]


def test_echo_and_no_tokens_scores(server, client, alone):
    scored = client.completions.create(model="tiny", prompt="abc", echo=True, logprobs=1, max_tokens=0).choices[0]
    assert (scored.text, scored.finish_reason) == ("abc", "length")
    assert scored.logprobs.token_logprobs[1:] == pytest.approx(alone["abc"].prompt_logprobs.tolist(), abs=1e-5)
    assert scored.logprobs.top_logprobs[0] is None


def test_logprobs_of_a_chat_have_bytes_and_alternatives(server, client, llm, alone):
    result = alone["chat"]
    done = client.chat.completions.create(messages=HI, logprobs=True, top_logprobs=3, **GREEDY)
    content = done.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx(result.logprobs.tolist(), abs=1e-5)
    assert [bytes(entry.bytes) for entry in content] == [llm.tokenizer.token_bytes(token) for token in result.tokens]
    for entry, top in zip(content, result.top_logprobs, strict=True):
        assert [bytes(each.bytes) for each in entry.top_logprobs] == [llm.tokenizer.token_bytes(t) for t, _ in top]


def test_prompt_logprobs_tokens_and_versions_are_given_where_wanted(server, http, alone):
    body = {**GREEDY, "prompt": "abc", "n": 2, "prompt_logprobs": 2, "return_token_ids": True, "logprobs": 1,
            "processed_logprobs": True}  # fmt: skip
    for choice in http.post("/v1/completions", json=body).json()["choices"]:
        first, *rest = choice["prompt_logprobs"]
        assert first is None
        assert [each["logprob"] for each in rest] == pytest.approx(alone["abc"].prompt_logprobs.tolist(), abs=1e-5)
        assert [len(each["top_logprobs"]) for each in rest] == [2, 2]
        assert choice["token_ids"] == alone["abc"].tokens
        assert choice["prompt_token_ids"] == alone["abc"].prompt_tokens
        assert choice["versions"] == [0] * 12
        assert choice["logprobs"]["processed_token_logprobs"] == [0.0] * 12  # one token is all there is to draw from
        assert {len(top) for top in choice["logprobs"]["top_logprobs"]} == {1}


def test_a_text_that_stops_is_no_part_of_the_answer(server, client, alone):
    text = alone["abc"].text
    stop = text[5:8]
    (choice,) = client.completions.create(prompt="abc", stop=["never", stop], **GREEDY).choices
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    pieces = client.completions.create(prompt="abc", stop=stop, stream=True, **GREEDY)
    assert "".join(piece.choices[0].text for piece in pieces) == choice.text


SETTINGS = {
    "temperature": 0.5, "top_p": 0.25, "seed": 9, "presence_penalty": 0.2, "frequency_penalty": 0.3, "top_k": 7,
    "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "processed_logprobs": True, "max_tokens": 3,
    "logit_bias": {"1": 2.0}, "stop": ["x"], "stop_token_ids": [4], "allowed_token_ids": [1, 2, 4], "priority": 3,
    "user": "somebody", "logprobs": 2, "prompt_logprobs": 1,
}  # fmt: skip


def test_every_parameter_reaches_the_engine(server, http, monkeypatch):
    seen = []
    submit = server.front.service.submit
    monkeypatch.setattr(server.front.service, "submit", lambda r, p: (seen.extend(r), submit(r, p)))
    assert http.post("/v1/completions", json={"model": "tiny", "prompt": "abc", **SETTINGS}).status_code == 200
    (request,) = seen
    asked = request.sampling
    named_otherwise = {
        "logit_bias": {1: 2.0}, "stop_text": ("x",), "stop": (257, 4), "allowed_tokens": (1, 2, 4),
        "prompt_logprobs": True,
    }  # fmt: skip
    for field in dataclasses.fields(Sampling):
        expected = {**SETTINGS, **named_otherwise}[field.name]
        assert getattr(asked, field.name) == expected != field.default, field.name
    assert (request.priority, request.client) == (3, "no key/somebody")
    assert http.post("/v1/completions", json={**GREEDY, "prompt": "abc", "ignore_eos": True}).status_code == 200
    assert seen[1].sampling.stop == ()


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("best_of", 2, "best_of: found 2, expected 1: nothing else is supported"),
        ("suffix", "x", 'suffix: found "x", expected "": nothing else is supported'),
        ("temprature", 1, "temprature: no such field, or not supported; the fields are allowed_token_ids, best_of"),
        ("temperature", -1, "temperature: found -1, expected a number of at least 0"),
        ("temperature", "1", 'temperature: found "1", expected a number of at least 0'),
        ("top_p", 0, "top_p: found 0, expected a number of more than 0 and at most 1"),
        ("n", 0, "n: found 0, expected a whole number of at least 1 and at most 128"),
        ("n", True, "n: found true, expected a whole number"),
        ("logprobs", 21, "logprobs: found 21, expected a whole number of at least 0 and at most 20"),
        ("seed", -1, "seed: found -1"),
        ("stop", "", 'stop: found "", expected a text that is not empty, or a list of at most 16'),
        ("stop", ["x"] * 17, "expected a text that is not empty, or a list of at most 16"),
        ("stop", ["x", ""], 'stop[1]: found "", expected a text that is not empty'),
        ("stop", ["a", 3], "stop[1]: found 3, expected a text"),
        ("logit_bias", {"x": 1}, "logit_bias: found 'x', expected token ids as its names"),
        ("logit_bias", {"1": 101}, "logit_bias.1: found 101"),
        ("logit_bias", {"999": 1}, "logit_bias: token 999 is not in the vocabulary, expected 0 to 257"),
        ("logit_bias", {"1": 1, "01": 2}, "logit_bias: found '01', expected token ids as its names"),
        ("logit_bias", {str(i): 1 for i in range(321)}, "logit_bias: found 321 tokens, expected at most 320"),
        ("stop_token_ids", [1, 258], "stop_token_ids: token 258 is not in the vocabulary, expected 0 to 257"),
        ("allowed_token_ids", [258], "allowed_token_ids: token 258 is not in the vocabulary, expected 0 to 257"),
        ("min_tokens", 13, "min_tokens=13, expected at most max_tokens, 12"),
        ("temperature", 1e39, "temperature: found 1e+39, expected a number of at least 0 and at most 1000000.0"),
        ("repetition_penalty", 0, "repetition_penalty: found 0, expected a number of at least 1e-06"),
        ("prompt", ["a"] * 1025, "1025 choices in one call, expected at most 1024, as many as may wait"),
        ("prompt", ["a", 1], "prompt[1]: found 1, expected a text"),
        ("prompt", [1, "a"], 'prompt[1]: found "a", expected a whole number'),
        ("prompt", [[1], 2], "prompt[1]: found 2, expected a list of at least 1"),
        ("prompt", [None], "prompt: found [null], expected a text, a list of texts, token ids, or a list of lists"),
        ("prompt", [[[]]], "prompt[0][0]: found [], expected a whole number"),
        ("a\nb", 1, "a\\nb: no such field"),
        ("suffix", "x" * 1000, 'suffix: found "xxx'),
        ("user", 3, "user: found 3, expected a text"),
        ("allowed_token_ids", [], "allowed_token_ids: found 0 entries, expected a list of at least 1"),
        ("stream_options", {"include_usage": True}, "stream_options without stream"),
        ("processed_logprobs", True, "processed_logprobs without logprobs"),
        ("prompt", "", "prompt: found no token"),
        ("prompt", ["a", ""], "prompt: found no token"),
        ("min_tokens", 13, "min_tokens=13, expected at most max_tokens, 12"),
        ("seed", 10**19, "seed: found 10000000000000000000, expected a whole number"),
        ("prompt", [], "prompt: found [], expected a text, a list of texts, token ids"),
        ("prompt", [[1], ["a"]], "prompt[1][0]: found \"a\""),
        ("prompt", [999], "prompt: token 999 is not in the vocabulary, expected 0 to 257"),
        ("prompt", "\ud800", "the text is not valid Unicode"),
        ("prompt", "x" * 200, "a prompt of 200 tokens and max_tokens of 12 are more than the context of 128"),
        ("max_tokens", 126, "a prompt of 3 tokens and max_tokens of 126 are more than the context of 128"),
        ("model", "gpt-4", "model 'gpt-4' is not served here, 'tiny' is"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(server, http, field, value, says):
    body = json.dumps({**GREEDY, "prompt": "abc", field: value})
    answer = http.post("/v1/completions", content=body)
    error = answer.json()["error"]
    assert answer.status_code == (404 if field == "model" else 400)
    assert says in error["message"] and not error["message"].startswith("the body")
    assert (error["type"], set(error)) == ("invalid_request_error", {"message", "type", "param", "code"})
    assert "\n" not in error["message"]
    assert error["param"].startswith(json.dumps(field)[1:-1])


@pytest.mark.parametrize("content", ["", "\ud800"], ids=["empty", "no Unicode"])
def test_what_is_wrong_with_a_text_of_a_chat_is_said_of_its_messages(server, http, monkeypatch, content):
    if not content:
        monkeypatch.setattr(server.front.llm.tokenizer, "chat_template", "{% for m in messages %}{% endfor %}")
    messages = [{"role": "user", "content": content}]
    body = {"model": "tiny", "messages": messages}
    assert http.post("/v1/chat/completions", content=json.dumps(body)).json()["error"]["param"] == "messages"
    if content:
        answer = http.post("/tokenize", content=json.dumps({"messages": messages}))
        assert answer.json()["error"]["param"] == "messages"
        answer = http.post("/tokenize", content=json.dumps({"prompt": content}))
        assert answer.json()["error"]["param"] == "prompt"


def test_a_number_of_thousands_of_digits_is_refused_as_such(http):
    answer = http.post("/v1/completions", content='{"model": "tiny", "prompt": "a", "seed": ' + "1" * 6000 + "}")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "found a number of 6000 digits, expected at most 400"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("tools", [{"type": "function"}], "tools: found"),
        ("response_format", {"type": "json_object"}, "response_format: found"),
        ("top_logprobs", 2, "top_logprobs without logprobs"),
        ("messages", [], "messages: found 0 entries, expected a list of at least 1"),
        ("messages", [{"role": "tool", "content": "x"}], "messages[0].role: found"),
        (
            "messages",
            [{"role": "user", "content": [{"image_url": {"url": "x"}, "type": "image_url"}]}],
            'messages[0].content[0].type: found "image_url", expected "text": nothing else is supported',
        ),
        ("messages", [{"role": "user"}], "messages[0].content is missing"),
        ("max_completion_tokens", 3, "max_tokens and max_completion_tokens are the same: give one"),
    ],
)
def test_what_a_chat_cannot_honour_is_refused_by_name(server, http, field, value, says):
    answer = http.post("/v1/chat/completions", json={**GREEDY, "messages": HI, field: value})
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_fields_that_change_nothing_and_nulls_are_taken(server, http, alone):
    body = {**GREEDY, "prompt": "abc", "best_of": 1, "suffix": None, "stop": None, "logprobs": None, "n": 1.0}
    assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == alone["abc"].text


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100000, b'{"a": 1e999}', b"null",
        b'{"model": "\xc3\x28"}', b'{"model": "tiny", "model": 5}', b"1" * 5000, b'{"prompt": "\xed\xa0\x80"}',
    ],
)  # fmt: skip
def test_a_body_that_is_not_what_it_should_be_is_refused(server, http, content):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = http.post(path, content=content)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_a_field_that_is_there_twice_is_refused_by_name(server, http, path):
    for body in (b'{"n": 1, "prompt": "a", "n": 1}', b'{"prompt": "a", "logit_bias": {"7": 1, "n": 2, "n": 2}}'):
        error = http.post(path, content=body).json()["error"]
        assert (error["message"], error["param"]) == ("n: found more than once, expected once", "n")


def test_no_depth_of_nesting_is_too_much_for_the_server(server, http):
    for depth in [*range(900, 1000, 2), 20_000]:
        content = b'{"model": "tiny", "prompt": "a", "n": ' + b"[" * depth + b"]" * depth + b"}"
        assert http.post("/v1/completions", content=content).status_code == 400


def test_a_coded_body_is_refused_and_not_read_as_if_it_were_plain(server, http):
    body = b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'
    answer = http.post("/v1/completions", content=gzip.compress(body), headers={"Content-Encoding": "gzip"})
    said = "Content-Encoding: found 'gzip', expected none: send it plain"
    assert (answer.status_code, answer.json()["error"]["message"]) == (415, said)
    assert http.post("/v1/completions", content=body, headers={"Content-Encoding": "identity"}).status_code == 200


def test_other_paths_and_methods_are_errors_of_the_same_shape(server, http):
    assert http.get("/nothing").status_code == 404
    wrong = http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"] == "GET is not for /v1/completions, expected POST"
    assert http.post("/health").json()["error"]["message"] == "POST is not for /health, expected GET or HEAD"
    assert http.get("/nothing").json()["error"]["message"] == "no such path: /nothing"
    assert http.get("/health/").json()["error"]["message"] == "no such path: /health/"
    counted = http.get("/metrics").text
    assert 'jaxsys_http_calls_total{path="other",status="404"} 3.0' in counted
    assert 'jaxsys_http_calls_total{path="/v1/completions",status="405"} 1.0' in counted


def test_models_are_listed(server, client):
    (card,) = client.models.list().data
    assert (card.id, card.owned_by, card.max_model_len) == ("tiny", "jaxsys", 128)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"


def test_tokenize_and_detokenize(server, http, llm):
    tokens = http.post("/tokenize", json={"prompt": "aé<s>"}).json()
    assert tokens == {"tokens": llm.tokenizer.encode("aé<s>"), "count": 4, "max_model_len": 128}
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "aé<s>"}
    chat = http.post("/tokenize", json={"messages": HI}).json()["tokens"]
    assert chat == llm.tokenizer.encode("<s>user:hi<s>", add_bos=False)
    assert "999" in http.post("/detokenize", json={"tokens": [999]}).json()["error"]["message"]
    assert http.post("/tokenize", json={}).status_code == 400


def test_metrics_say_what_happened(server, http):
    def value(name):
        lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name + " ")]
        return float(lines[0].split()[1])

    before = value("jaxsys_generated_tokens_total")
    firsts = value("jaxsys_time_to_first_token_seconds_count")
    http.post("/v1/completions", json={**GREEDY, "prompt": "a prompt of many tokens", "n": 2})
    server.idle()
    assert value("jaxsys_generated_tokens_total") == before + 24
    assert value("jaxsys_time_to_first_token_seconds_count") == firsts + 2
    assert value("jaxsys_prompt_tokens_reused_total") > 0
    assert value("jaxsys_kv_pages_used") == value("jaxsys_requests_running") == value("jaxsys_weight_version") == 0
    assert value("jaxsys_kv_pages") > 0


def test_the_published_document_allows_what_is_allowed(server, http):
    document = http.get("/openapi.json").json()
    fields = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(SETTINGS) <= set(fields["properties"])
    for path, methods in document["paths"].items():
        for method in methods:
            assert http.request(method.upper(), path, json={"wrong": 1}).status_code in (200, 400), path


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_leaves_nothing_running(server, llm, monkeypatch, stream):
    gate = Gate(llm.engine, monkeypatch, after=2 if stream else 0)
    cancelled = llm.engine.scheduler.counts.cancelled
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 100, "n": 3, "stream": stream, "ignore_eos": True}
    with httpx.Client(base_url=server.address, timeout=SECONDS) as http:
        if stream:
            with http.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.5)
            assert gate.reached.wait(SECONDS)
    while server.front.calls:  # heard of while the engine stands still
        pass
    gate.open.set()
    server.idle()
    assert llm.engine.scheduler.counts.cancelled == cancelled + 3


def test_many_clients_at_once_get_what_they_get_alone(server, client, alone):
    texts = {}

    def ask(i):
        name = ("abc", "hello")[i % 2]
        texts[i] = (client.completions.create(prompt=name, **GREEDY).choices[0].text, alone[name].text)

    threads = [threading.Thread(target=ask, args=[i]) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 16
    assert all(given == expected for given, expected in texts.values())
