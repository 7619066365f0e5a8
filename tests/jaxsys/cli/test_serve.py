"""``jaxsys serve`` as a program: it starts, answers, lets what runs finish, and ends; what cannot be is one line."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from tiny_runs import write_model

from jaxsys.cli.command_line import parse
from jaxsys.cli.main import main

ROOT = Path(__file__).parents[3]
SECONDS = 120.0


@pytest.fixture
def model(tmp_path, material) -> Path:
    """A tiny model as a Hugging Face directory."""
    write_model(tmp_path / "tiny", material)
    (tmp_path / "tiny" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}:")
    return tmp_path / "tiny"


def started(process: subprocess.Popen) -> str:
    """Where it listens, once it says so."""
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.fullmatch(r"serving tiny on (http://127\.0\.0\.1:\d+)\n", line):
            return found[1]
    raise AssertionError("".join(said))


def ready(address: str) -> int:
    """Status of /ready; 0 where nobody listens any more."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{address}/ready", timeout=SECONDS).status_code
    return 0


def test_it_answers_and_lets_what_runs_finish_until_a_second_signal(model, tmp_path):
    (tmp_path / "keys").write_text("first\n\nsecond\n")
    options = ["--port", "0", "--api-keys-file", str(tmp_path / "keys"), "--drain-seconds", "100"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    command = [sys.executable, "-m", "jaxsys.cli.main", "serve", str(model), *options]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        address = started(process)
        assert httpx.get(f"{address}/v1/models").status_code == 401
        client = stack.enter_context(
            openai.OpenAI(base_url=f"{address}/v1", api_key="second", timeout=SECONDS, max_retries=0)
        )
        (card,) = client.models.list().data
        hello = [{"role": "user", "content": "hello"}]
        assert client.chat.completions.create(model=card.id, messages=hello, max_tokens=3).choices[0].message.content

        endless = {"max_tokens": 60, "n": 128, "extra_body": {"ignore_eos": True, "priority": 1}}
        others = [client.completions.create(model="tiny", prompt="b", stream=True, **endless) for _ in range(7)]
        urgent = {"max_tokens": 60, "extra_body": {"ignore_eos": True, "priority": 0}}
        stream = client.completions.create(model="tiny", prompt="a", stream=True, **urgent)
        pieces = [next(stream)]
        process.send_signal(signal.SIGTERM)
        while (status := ready(address)) == 200:
            time.sleep(0.01)
        assert status == 503
        with pytest.raises(openai.InternalServerError, match="the server is shutting down"):
            client.completions.create(model="tiny", prompt="c")
        pieces += stream
        assert pieces[-1].choices[0].finish_reason == "length"
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
        assert process.stderr.read() == "ended\n"
        told = 0
        for other in others:
            try:
                list(other)
            except openai.APIError as error:
                told += "the server is shutting down" in str(error)
        assert told
        assert ready(address) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--drain-seconds", "-1"], "serve: --drain-seconds -1.0, expected 0 or more"),
        (["--drain-seconds", "nan"], "serve: --drain-seconds nan, expected 0 or more"),
        (["--max-queue", "0"], "serve: --max-queue 0, expected at least 1"),
        (["--max-body", "0"], "serve: --max-body 0, expected at least 1"),
        (["--api-key", ""], "serve: found an empty --api-key, expected a text"),
        (["--api-keys-file", "{tmp}/none"], "{tmp}/none: No such file or directory; check the path"),
        (["--api-keys-file", "{tmp}/empty"], "{tmp}/empty: found no key, expected one a line"),
        (["--port", "{port}"], "cannot listen on host 127.0.0.1 port {port}: Address already in use; name others"),
        (["--port", "70000"], "cannot listen on host 127.0.0.1 port 70000: "),
        (["--host", "no.such.host.invalid", "--port", "0"], "cannot listen on host no.such.host.invalid port 0: "),
        (["--port", "0"], "model '{tmp}/model': no such path"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, capsys, options, says):
    (tmp_path / "empty").write_text("\n  # ours\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"tmp": tmp_path, "port": taken.getsockname()[1]}
        assert main(["serve", str(tmp_path / "model"), *(option.format(**names) for option in options)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"jaxsys: {says.format(**names)}") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["smollm2-135m-instruct"], "smollm2-135m-instruct"),
        (["organisation/model"], "model"),
        (["runs/first/"], "first"),
        (["."], "here"),
        ([".", "--name", "other"], "other"),
    ],
)
def test_a_model_is_called_by_the_last_part_of_its_path(tmp_path, monkeypatch, words, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert parse(["serve", *words]).served_as == name


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "prometheus_client"])
def test_without_its_extra_it_says_which(monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["serve", "model"]) == 2
    assert capsys.readouterr().err == f"jaxsys: serve: {package} is not installed: pip install 'jaxsys[serve]'\n"
