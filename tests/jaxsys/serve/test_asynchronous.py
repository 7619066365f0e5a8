"""The engine called from asyncio: many tasks at once, some leave, and all get what a call alone gives."""

import asyncio
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from http_server import SECONDS, make_llm

import jaxsys
from jaxsys.serve.service import Busy, Closed
from parallelism.errors import UserError

GREEDY = {"max_tokens": 12, "temperature": 0.0, "stop": ()}
PROMPTS = ["one", "a longer prompt, of two pages", "3"]


@pytest.fixture(scope="module")
def llm():
    return make_llm()


@pytest.fixture(scope="module")
def alone(llm):
    """What each call gives by itself; before a service has the engine."""
    results = [llm.generate([prompt], **GREEDY)[0] for prompt in PROMPTS]
    return results, llm.score([r.prompt_tokens + r.tokens for r in results])


def run(llm, work, **options):
    """``work`` with an AsyncLLM; every page has come back after it."""

    async def main():
        async with jaxsys.AsyncLLM(llm, **options) as served:
            found = await asyncio.wait_for(work(served), SECONDS)
            for _ in range(1000):
                if not served.service.active:
                    break
                await asyncio.sleep(0.01)
            assert not served.service.active and not llm.engine.scheduler.running
            return found

    return asyncio.run(main())


def test_tasks_that_run_together_get_what_each_gets_alone(llm, alone):
    results, scores = alone

    async def work(served):
        calls = [served.generate([prompt], **GREEDY) for prompt in PROMPTS]
        return await asyncio.gather(*calls, served.score([r.prompt_tokens + r.tokens for r in results]))

    *found, scored = run(llm, work)
    assert [(r.text, r.tokens, r.finish_reason) for (r,) in found] == [
        (r.text, r.tokens, r.finish_reason) for r in results
    ]
    for a, b in zip(scored, scores, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_pieces_of_streams_add_up_to_their_texts(llm, alone):
    async def read(served, i):
        return "".join([piece async for piece in served.stream(PROMPTS[i], **GREEDY)])

    async def work(served):
        return await asyncio.gather(*(read(served, i) for i in range(3)))

    assert run(llm, work) == [result.text for result in alone[0]]


def test_several_choices_and_chats(llm):
    async def work(served):
        return await served.generate(["a", "b"], n=2, chat=True, max_tokens=3, seed=5)

    found = run(llm, work)
    assert len(found) == 4 and found[0].prompt_tokens == found[1].prompt_tokens != found[2].prompt_tokens


def test_whoever_leaves_has_their_requests_dropped(llm, monkeypatch):
    turns, begun, launch = threading.Semaphore(0), [], llm.engine.launch

    def when_it_may(max_steps=None):
        begun.append(1)
        assert turns.acquire(timeout=SECONDS)
        return launch(max_steps)

    monkeypatch.setattr(llm.engine, "launch", when_it_may)

    async def turn():
        """One more batch, once the one before is done."""
        before = len(begun)
        turns.release()
        while len(begun) == before:
            await asyncio.sleep(0.001)

    async def work(served):
        long = dict(GREEDY, max_tokens=100)
        task = asyncio.create_task(served.generate(PROMPTS * 3, **long))
        stream = served.stream("x", **long)
        first = asyncio.ensure_future(anext(stream))
        while not begun:
            await asyncio.sleep(0.001)
        await turn()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not first.done():
            await turn()
        await stream.aclose()
        turns.release(1000)

    before = llm.engine.scheduler.counts.cancelled
    run(llm, work)
    assert llm.engine.scheduler.counts.cancelled == before + len(PROMPTS * 3) + 1


def test_what_cannot_be_is_refused(llm, monkeypatch):
    begun, launch = [], llm.engine.launch

    def slow(max_steps=None):
        begun.append(time.sleep(0.2))
        return launch(max_steps)

    monkeypatch.setattr(llm.engine, "launch", slow)

    async def work(served):
        for call in (
            served.generate("text", **GREEDY),
            served.generate([[]], **GREEDY),
            served.generate(["a"], temprature=1),
            served.score(3),
            anext(served.stream("a", max_tokens=-1)),
        ):
            with pytest.raises(UserError):
                await call
        with pytest.raises(Busy, match="requests wait already"):
            await served.generate(["a"] * 9, **GREEDY)
        assert await served.generate([], **GREEDY) == [] == await served.score([])
        running = asyncio.create_task(served.generate(["a"], **GREEDY | {"max_tokens": 100}))
        while not begun:
            await asyncio.sleep(0.001)
        await served.close()
        with pytest.raises(Closed, match="the AsyncLLM was closed: await its calls before that"):
            await running
        with pytest.raises(Closed, match="the AsyncLLM was closed: await its calls before that"):
            await served.generate(["a"], **GREEDY)

    run(llm, work, max_queue=8)


def test_the_example_of_the_page_runs(llm, capsys):
    page = (Path(__file__).parents[3] / "docs" / "generation.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "AsyncLLM" in code]
    exec("import asyncio, jaxsys\n" + example, {"llm": llm})
    assert len(capsys.readouterr().out) > 10
