"""Clients that send what they like and leave when they like: no defect, and nothing of them is left."""

import asyncio
import contextlib
import gc
import json
import os
import random
import socket
import struct
import threading
from collections import Counter

import pytest
from http_server import SECONDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxsys.serve.answers import Answer
from jaxsys.serve.request import Request
from jaxsys.serve.service import _Job
from jaxsys.serve.text import Text
from jaxsys.serve.watch import Watch

SLOW = pytest.mark.slow

# ------------------------------------------------------------------------------------- bodies, from the document

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)
WORDS = st.text(max_size=12) | st.sampled_from(["<s>", "</s>", "a\0b", "\ud800", "é", "x" * 200])


def allowed(schema: dict) -> st.SearchStrategy:
    """Values that a schema of the document allows."""
    if "anyOf" in schema:
        return st.one_of(*map(allowed, schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema["type"]:
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            low, high = schema["minimum"], schema["maximum"]
            likely = st.integers(low, min(high, 100))  # to be a token, or to fit the context
            return st.one_of(*[likely] * 5, st.integers(low, high))
        case "number":
            low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema["maximum"]
            return st.floats(low, high, exclude_min="exclusiveMinimum" in schema)
        case "string":
            return WORDS.filter(lambda text: len(text) >= schema.get("minLength", 0))
        case "array":
            least, most = schema.get("minItems", 0), min(schema.get("maxItems", 4), 4)
            return st.lists(allowed(schema["items"]), min_size=least, max_size=most)
    if others := schema.get("additionalProperties"):
        return st.dictionaries(st.integers(0, 300).map(str) | WORDS, allowed(others), max_size=4)
    required = {name: allowed(schema["properties"][name]) for name in schema.get("required", ())}
    optional = {name: allowed(each) for name, each in schema["properties"].items() if name not in required}
    return st.fixed_dictionaries(required, optional=optional)


GOOD = {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}


@st.composite
def bodies(draw: st.DrawFn, schema: dict) -> dict:
    """What a schema allows, mostly; some fields wrong, missing or unknown."""
    properties = schema["properties"]
    # Few fields as often as many: of many one is usually refused.
    names = draw(st.lists(st.sampled_from(sorted(properties)), max_size=draw(st.sampled_from([0, 1, 5])), unique=True))
    body = {name: draw(allowed(properties[name])) for name in sorted({*names, *schema.get("required", ())})}
    if draw(st.booleans()):  # so that the other fields are looked at too
        body |= {name: value for name, value in GOOD.items() if name in schema.get("required", ())}
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        if body and draw(st.booleans()):
            body.pop(draw(st.sampled_from(sorted(body))))
        else:
            body[draw(st.sampled_from(sorted(properties)) | st.text(max_size=5))] = draw(ANYTHING)
    return body


def check_refusal(answer) -> None:
    """OpenAI's shape, one line, nothing of the inside."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def fuzz(server, http, examples: int) -> Counter:
    """Statuses of bodies drawn from what the server publishes."""
    document, statuses = http.get("/openapi.json").json(), Counter()
    posts = {path: methods["post"] for path, methods in document["paths"].items() if "post" in methods}
    schemas = {path: post["requestBody"]["content"]["application/json"]["schema"] for path, post in posts.items()}

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=HealthCheck)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from([*schemas, *list(schemas)[:2] * 2]))
        body = data.draw(bodies(schemas[path]))
        answer = http.post(path, content=json.dumps(body))
        statuses[path, answer.status_code] += 1
        known = set(schemas[path]["properties"])
        assert answer.status_code == 200 or answer.status_code in (400, 404), (body, answer.text)
        if answer.status_code != 200:
            check_refusal(answer)
        else:
            assert set(body) <= known, body
            if body.get("stream"):
                *_, last = [line for line in answer.text.split("\n\n") if line]
                assert last == "data: [DONE]"

    run()
    return statuses


@pytest.mark.parametrize("examples", [100, pytest.param(5000, marks=SLOW)])
def test_whatever_a_body_holds_the_answer_is_one_or_says_why_not(server, http, examples):
    statuses = fuzz(server, http, examples)
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert statuses[path, 200] > examples // 50, statuses
        assert statuses[path, 400] > examples // 50, statuses


@pytest.mark.parametrize("examples", [200, pytest.param(5000, marks=SLOW)])
def test_bytes_of_any_kind_are_refused(server, http, examples):
    draw = random.Random(0)
    good = json.dumps({"model": "tiny", "prompt": "aé", "max_tokens": 1, "stop": ["x"]}, ensure_ascii=False).encode()
    for _ in range(examples):
        raw = bytearray(good)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(raw))
            raw[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        path = draw.choice(["/v1/completions", "/tokenize", "/detokenize", "/v1/chat/completions"])
        answer = http.post(path, content=bytes(raw))
        assert answer.status_code in (200, 400, 404), raw
        if answer.status_code != 200:
            check_refusal(answer)


HUGE = {
    "text": {"prompt": "x y " * 300_000},
    "one word": {"prompt": "x" * 1_200_000},
    "tokens": {"prompt": [1] * 1_300_000},
    "prompts": {"prompt": [[1]] * 200_000},
    "texts": {"prompt": ["a"] * 700_000},
    "choices": {"prompt": ["a"] * 1000, "n": 128},
    "stops": {"prompt": "a", "stop": ["x" * 200_000] * 16, "max_tokens": 100},
    "biases": {"prompt": "a", "logit_bias": {str(i): 1 for i in range(100_000)}},
    "user": {"prompt": "a", "user": "x" * 4_000_000},
    "unknown": {"prompt": "a", "y" * 4_000_000: 1},
}


@pytest.mark.parametrize("what", HUGE)
def test_a_huge_body_is_answered_while_others_are_served(server, http, what):
    answers = []
    body = json.dumps({"model": "tiny", **HUGE[what]})
    thread = threading.Thread(target=lambda: answers.append(http.post("/v1/completions", content=body)))
    thread.start()
    small = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 2})
    assert small.status_code == 200
    thread.join(SECONDS)
    (answer,) = answers
    assert answer.status_code == (200 if what in ("stops", "user") else 400)
    assert len(answer.content) < 5000
    if answer.status_code == 400:
        check_refusal(answer)


# ---------------------------------------------------------------------------------- clients that come and go


def left(server) -> dict[str, int]:
    """What there is of clients, everywhere that something of them could be."""
    gc.collect()
    service, scheduler = server.front.service, server.front.llm.engine.scheduler
    (listening,) = server.server.servers
    everything = Counter(type(each) for each in gc.get_objects())
    waiting = scheduler.waiting
    return {
        "pages": sum(pages.used for pages in scheduler.pages),
        "scheduler": len(scheduler.running) + scheduler.queued,
        "fair share": len(waiting._queued) + len(waiting._known) + len(waiting._present) + len(waiting._levels),
        "jobs": service.active + len(service._jobs) + len(service._new) + len(service._cancelled),
        "calls": server.front.calls,
        "tasks": len(asyncio.all_tasks(listening.get_loop())),
        "engine threads": sum(thread.name == "jaxsys-serve" for thread in threading.enumerate()),
        "files": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
        **{kind.__name__: everything[kind] for kind in (Request, Watch, Answer, Text, _Job)},
    }


def resident() -> int:
    """Bytes of memory of this process, where Linux says so."""
    with contextlib.suppress(FileNotFoundError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


class Comers:
    """Clients by raw connections, each of which does something else with its call."""

    WAYS = ("stays", "stays", "leaves", "resets", "half a body", "leaves a stream", "resets a stream", "dawdles", "rot")

    def __init__(self, server, seed: int = 0):
        self._address = server.server._socket.getsockname()
        self._draw = random.Random(seed)
        self.ways: Counter[str] = Counter()
        self.answered = 0  # of those that stay

    def run(self, times: int, together: int = 16) -> None:
        async def all_of_them() -> None:
            numbers = iter(range(times))

            async def some() -> None:
                for _ in numbers:
                    await asyncio.wait_for(self._one(), SECONDS)

            await asyncio.gather(*(some() for _ in range(together)))

        asyncio.run(all_of_them())

    async def _one(self) -> None:
        draw, way = self._draw, self._draw.choice(self.WAYS)
        self.ways[way] += 1
        stream = "stream" in way or draw.random() < 0.5
        body = json.dumps({
            "model": "tiny", "prompt": "x" * draw.randrange(1, 60), "max_tokens": draw.randrange(60), "stream": stream,
            "n": draw.choice([1, 1, 1, 3]), "user": f"user {draw.randrange(10**9)}", "priority": draw.randrange(2),
            "ignore_eos": True, "logprobs": draw.choice([None, 5]),
        }).encode()  # fmt: skip
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            with contextlib.suppress(OSError):
                await self._call(way, body, reader, writer)
        finally:
            if way.startswith("resets"):  # the other side hears of it as an error
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _call(self, way: str, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        draw = self._draw
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(
            body
        )
        if way == "rot":
            writer.write(draw.choice([b"\xff\xfe\x00\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"x" * 100_000, head[:40]]))
            await writer.drain()
            writer.write_eof()
            await reader.read()
            return
        writer.write(head + (body[: draw.randrange(len(body))] if way == "half a body" else body))
        await writer.drain()
        if way in ("leaves", "resets", "half a body"):
            await asyncio.sleep(draw.choice([0, 0, 0.001, 0.01, 0.05]))
        elif "stream" in way:
            await reader.read(draw.randrange(1, 3000))
        elif way == "dawdles":
            for _ in range(10):
                await reader.read(1)
                await asyncio.sleep(0.002)
        else:
            head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            assert b'"error"' not in answer
            if b"event-stream" in head:
                assert b"data: [DONE]" in answer
            else:
                assert json.loads(answer)["choices"]
            self.answered += 1


@pytest.mark.parametrize("times", [200, pytest.param(5000, marks=SLOW)])
def test_clients_that_come_and_go_leave_nothing(server, http, times):
    comers = Comers(server)
    comers.run(100)  # what is made once is made
    server.idle()
    before, memory = left(server), resident()
    comers.run(times)
    server.idle()
    after = left(server)
    assert all(after[what] <= before[what] for what in after), (before, after)
    assert (after["pages"], after["scheduler"], after["fair share"], after["jobs"]) == (0, 0, 0, 0)
    assert resident() - memory < 64 << 20
    assert set(comers.ways) == set(Comers.WAYS)
    assert comers.answered == comers.ways["stays"]
    assert not server.defects
    assert http.get("/health").status_code == 200
