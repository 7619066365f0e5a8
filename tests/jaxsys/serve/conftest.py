"""One engine for all tests that change nothing about it."""

import httpx
import openai
import pytest
from http_server import SECONDS, make_llm, running
from serve_engines import CONFIG, Reference, make_engine

from jaxsys.llm import LLM
from jaxsys.serve.engine import Engine


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference(CONFIG)


@pytest.fixture(scope="session")
def shared_engine() -> Engine:
    return make_engine()


@pytest.fixture
def engine(shared_engine) -> Engine:
    """The engine, which every test must leave idle and with all its pages."""
    yield shared_engine
    assert not shared_engine.busy
    assert [pages.used for pages in shared_engine.scheduler.pages] == [0]


@pytest.fixture(scope="session")
def llm() -> LLM:
    """A tiny model of bytes for servers, one after the other."""
    return make_llm()


@pytest.fixture(scope="module")
def shared(llm):
    with running(llm) as server:
        yield server


@pytest.fixture
def server(shared):
    """A server of ``llm``, which every test must leave idle and with all its pages."""
    yield shared
    shared.idle()


@pytest.fixture(scope="module")
def http(shared):
    with httpx.Client(base_url=shared.address, timeout=SECONDS) as client:
        yield client


@pytest.fixture(scope="module")
def client(shared):
    with openai.OpenAI(base_url=f"{shared.address}/v1", api_key="none", timeout=SECONDS, max_retries=0) as client:
        yield client
