"""A run that answers requests from the weights that it trains."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from tiny_runs import MODEL, make_config, quiet

import jaxsys
from jaxsys.data.packing import pack
from jaxsys.train.config import SampleConfig, ServeConfig
from jaxsys.train.metrics import read
from jaxsys.train.trainer import Trainer
from parallelism.errors import UserError

ROWS = {"steps": 12, "eval_every": 4, "sample": SampleConfig(("The quick",), every=4, max_tokens=8)}
FUSED = {"step_form": "fused"}
STAGES = {"mesh": "stage=2,fsdp=2", "accumulate": 2, "model": dataclasses.replace(MODEL, n_layers=2)}
SPLIT = {"step_form": "split", "accumulate": 2, "update_groups": 2}


class Clients:
    """Ask without a pause, from threads, until they are told to stop."""

    def __init__(self, trainer, threads=3, stream=True):
        self._client = openai.OpenAI(base_url=f"{trainer.server.address}/v1", api_key="none", max_retries=0)
        (self._model,) = (model.id for model in self._client.models.list())
        self._stop, self._stream, self.answers = threading.Event(), stream, []
        self._pool = ThreadPoolExecutor(threads)
        self._asked = [self._pool.submit(self._ask, i) for i in range(threads)]

    def _ask(self, i):
        while not self._stop.is_set():
            answer = self._client.completions.create(
                model=self._model,
                prompt=f"Document {i}",
                max_tokens=12,
                temperature=0.0,
                stream=self._stream and i == 0,
            )
            text = "".join(c.choices[0].text for c in answer) if self._stream and i == 0 else answer.choices[0].text
            self.answers.append(text)

    def end(self):
        self._stop.set()
        for asked in self._asked:
            asked.result()
        return self.answers


def trained(tmp_path, material, name, serve=None, stream=True, **options):
    console = quiet()
    config = make_config(tmp_path / name, material, **{**ROWS, **options})
    if serve is not None:
        config = type(config)(**{**vars(config), "serve": ServeConfig(port=0, **serve)})
    with Trainer(config, console) as trainer:
        clients = Clients(trainer, stream=stream) if serve is not None else None
        summary = trainer.run()
        answers = clients.end() if clients else []
        state = {key: np.asarray(array) for key, array in trainer.params.items()}
    return summary, state, answers, console.lines, trainer


@pytest.fixture(scope="module")
def alone(tmp_path_factory, material):
    runs = {}

    def run(**options):
        key = str(options)
        if key not in runs:
            runs[key] = trained(tmp_path_factory.mktemp("alone"), material, "run", **options)
        return runs[key]

    return run


@pytest.mark.parametrize(
    ("form", "compute", "policy"),
    [
        (FUSED, "float32", "switch"),
        (SPLIT, "float32", "finish"),
        (SPLIT, "bfloat16", "recompute"),
        (STAGES, "float32", "switch"),
    ],
    ids=["fused", "split-finish", "split-view", "stages"],
)
def test_a_run_that_serves_is_the_run_that_does_not(tmp_path, material, alone, form, compute, policy):
    options = {**form, "compute_dtype": compute}
    summary, state, answers, lines, trainer = trained(
        tmp_path, material, "run", {"share": 0.5, "new_weights": policy}, **options
    )
    without, expected, *_ = alone(**options)
    assert summary.losses == without.losses
    np.testing.assert_allclose(
        (summary.heldout_before, summary.heldout_after), (without.heldout_before, without.heldout_after), rtol=1e-6
    )
    for key, array in expected.items():
        np.testing.assert_array_equal(state[key], array)
    assert len(answers) > 6 and all(answers)
    rows = [row for row in read(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert sum(row["serving_seconds"] for row in rows) > 0
    assert sum(row["waited_for_serving_seconds"] for row in rows) > 0
    (said,) = (line for line in lines if line.startswith("serving had "))
    assert ("weights kept for its requests took" in said) == (policy == "finish")
    assert (trainer.live.kept_bytes, trainer.live.held) == (0, False)


def test_each_step_is_timed_by_itself_also_before_an_evaluation_and_at_the_end(tmp_path, material):
    config = make_config(tmp_path / "run", material, steps=4, eval_every=2, serve=ServeConfig(port=0))
    took = []
    with Trainer(config, quiet()) as trainer:
        launch = trainer._launch

        def timed(*args):
            began = time.perf_counter()
            waited = launch(*args)
            took.append(time.perf_counter() - began)
            return waited

        trainer._launch = timed
        trainer.run()
    seconds = [row["seconds"] for row in read(tmp_path / "run") if "loss" in row]
    assert len(seconds) == len(took) == 4
    assert all(said >= was for said, was in zip(seconds, took, strict=True))


def test_evaluations_and_samples_are_no_requests_of_clients(tmp_path, material):
    options = {"steps": 4, "eval_every": 2, "sample": SampleConfig(("The quick",) * 3, max_tokens=8)}
    config = make_config(tmp_path / "run", material, serve=ServeConfig(port=0, max_queue=1), **options)
    console = quiet()
    with Trainer(config, console) as trainer:
        trainer.run()
        metrics = httpx.get(f"{trainer.server.address}/metrics").text
        assert trainer.server.share.parties["serve"].used == 0
    (said,) = (line for line in console.lines if line.startswith("serving had "))
    assert said.startswith("serving had 0.0 s of the devices") and "late" not in said
    assert "jaxsys_requests_total{" not in metrics
    assert "jaxsys_request_seconds_count 0.0" in metrics


def test_requests_that_begin_again_are_not_streamed(tmp_path, material):
    config = make_config(tmp_path / "run", material, steps=3, serve=ServeConfig(port=0, new_weights="restart"))
    with Trainer(config, quiet()) as trainer:
        body = {"model": "run", "prompt": "The", "max_tokens": 4}
        url = f"{trainer.server.address}/v1/completions"
        refused = httpx.post(url, json={**body, "stream": True})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "stream"
        assert httpx.post(url, json=body).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.post(url, json=body)


def test_a_port_that_is_taken_and_a_job_of_several_processes_are_refused_at_once(tmp_path, material, monkeypatch):
    config = make_config(tmp_path / "run", material, serve=ServeConfig(port=0))
    with Trainer(config, quiet()) as trainer:
        port = int(trainer.server.address.rpartition(":")[2])
        taken = type(config)(**{**vars(config), "run": str(tmp_path / "other"), "serve": ServeConfig(port=port)})
        with pytest.raises(UserError, match=f"cannot listen on host 127.0.0.1 port {port}"):
            Trainer(taken, quiet())
    assert not (tmp_path / "other").exists()
    from jaxsys.train import live_server

    with pytest.raises(UserError, match=r"serve\.port=8000 in a job of 2 processes, expected one"):
        live_server.prepare(ServeConfig(port=8000), 2)


@pytest.mark.parametrize(
    ("serve", "says"),
    [
        ({"max_context": 1000}, r"serve\.max_context 1000: expected 1 to 64: the model was trained with 64 positions"),
        ({"kv_bytes": 1}, r"serve\.kv_bytes=1, expected at least \d+: the smallest pool of this model"),
        ({"api_keys_file": "/nope"}, "/nope"),
    ],
    ids=str,
)
def test_what_the_server_cannot_have_is_refused_before_anything_is_read(tmp_path, material, monkeypatch, serve, says):
    monkeypatch.setattr(Trainer, "_data", None)  # tokenises
    config = make_config(tmp_path / "run", material, serve=ServeConfig(port=0, **serve))
    with pytest.raises((UserError, FileNotFoundError), match=says):
        Trainer(config, quiet())


def test_the_start_says_the_context_and_why_it_is_less_than_the_models(tmp_path, material):
    console = quiet()
    big = dataclasses.replace(MODEL, max_seq_len=256)
    serve = ServeConfig(port=0, kv_bytes=20_000)
    with Trainer(make_config(tmp_path / "run", material, model=big, serve=serve), console) as trainer:
        assert trainer.inference.llm.engine.max_context == 128
    (said,) = (line for line in console.lines if line.startswith("compile"))
    assert "context 128 of the model's 256: kv_bytes=20000 holds no more; 2 pages of 64" in said


@pytest.mark.parametrize(
    ("values", "words"),
    [({"port": 70000}, "port"), ({"share": 1.0}, "share"), ({"share": 0.0}, "share"), ({"max_queue": 0}, "max_queue")],
    ids=str,
)
def test_a_setting_of_the_server_out_of_range_is_named(values, words):
    with pytest.raises(UserError, match=words):
        ServeConfig(**values)


def test_invariant_numerics_give_evaluation_scores_and_server_the_same_bits(tmp_path, material):
    config = make_config(tmp_path / "run", material, numerics="invariant", steps=2, serve=ServeConfig(port=0))
    with Trainer(config, quiet()) as trainer:
        trainer.run()
        body = {"model": "run", "prompt": "Document 7", "max_tokens": 12, "temperature": 0.7, "seed": 1, "logprobs": 0}
        choice = httpx.post(f"{trainer.server.address}/v1/completions", json=body).json()["choices"][0]
        served = choice["logprobs"]["token_logprobs"]
        inference, prompt = trainer.inference, trainer.tokenizer.encode("Document 7")
        request = inference.llm.request(prompt, inference.llm.sampling(max_tokens=12, temperature=0.7, seed=1))
        inference.service.run([request])
        tokens = request.tokens
        evaluated = inference.losses([pack([np.array(tokens)], len(tokens) + 3)])
    (scored,) = jaxsys.load(tmp_path / "run", numerics="invariant", max_context=40).score([tokens])
    assert np.float32(served).tolist() == request.logprobs == scored[len(prompt) - 1 :].tolist()
    assert evaluated == (-float(np.sum(scored, dtype=np.float64)), len(tokens) - 1)
