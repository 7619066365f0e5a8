"""The engine as a service: many threads ask, some leave, and nothing is left behind."""

import random
import threading

import pytest
from http_server import SECONDS, Gate
from serve_engines import make_engine

from jaxsys.serve.sampling import Sampling
from jaxsys.serve.service import Busy, Closed, Service
from jaxsys.share import DeviceShare


class Heard:
    """What one request's progress said."""

    def __init__(self):
        self.lengths, self.finished, self.times = [], threading.Event(), 0

    def __call__(self, request):
        self.lengths.append(request.made)
        if request.finish_reason is not None:
            self.times += 1
            self.finished.set()


def ask(service, prompt, **settings):
    """(request, what was heard of it), queued."""
    request = service.engine.make_request(prompt, Sampling(**{"temperature": 0.0, "max_tokens": 12} | settings))
    heard = Heard()
    service.submit([request], heard)
    return request, heard


@pytest.fixture
def service(engine):
    """Of the shared engine, which gets all its pages back."""
    service = Service(engine)
    yield service
    service.close()
    assert service.active == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "jaxsys-serve"]


def test_programs_run_once_while_nobody_asks():
    engine = make_engine()
    service = Service(engine)
    request, heard = ask(service, [3, 5])
    assert heard.finished.wait(SECONDS)
    waiting = threading.Event()
    for _ in range(int(100 * SECONDS)):
        if not engine.cold or service.error is not None:
            break
        waiting.wait(0.01)
    service.close()
    assert not engine.cold and len(request.logprobs) == 12


def test_requests_of_many_threads_come_out_as_alone(service, reference):
    prompts = [[3 + i, 5, 7 + i] for i in range(12)]
    made = {}

    def client(i):
        request, heard = ask(service, prompts[i])
        assert heard.finished.wait(SECONDS)
        made[i] = request

    threads = [threading.Thread(target=client, args=[i]) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, prompt in enumerate(prompts):
        assert made[i].tokens[len(prompt) :] == reference.greedy(prompt, 12)[0]
        assert made[i].finish_reason == "length"


def test_progress_is_heard_as_tokens_are_made_and_the_end_once(service):
    _, heard = ask(service, [1, 2, 3], max_tokens=40)
    assert heard.finished.wait(SECONDS)
    assert heard.lengths == sorted(heard.lengths)
    assert len(set(heard.lengths)) >= 10  # 4 tokens at a time
    assert (heard.times, heard.lengths[-1]) == (1, 40)


def test_a_finished_request_is_reported_with_its_times(engine):
    reported = []
    service = Service(engine, finished=lambda request, times: reported.append((request, times)))
    request, heard = ask(service, [1, 2, 3], max_tokens=20)
    assert heard.finished.wait(SECONDS)
    assert service.close(SECONDS)
    ((same, times),) = reported
    assert same is request
    assert times.came <= times.first < times.last


def test_who_waits_and_who_runs_can_leave(service, monkeypatch):
    gate = Gate(service.engine, monkeypatch)
    running = [ask(service, [i, 1, 2], max_tokens=60) for i in range(4)]
    assert gate.reached.wait(SECONDS)
    waiting = [ask(service, [i, 3, 4], max_tokens=60) for i in range(4)]
    assert service.queued >= 4
    for request, _ in [*waiting, running[0]]:
        service.cancel(request)
    gate.open.set()
    for _, heard in [*running, *waiting]:
        assert heard.finished.wait(SECONDS)
        assert heard.times == 1
    assert [request.finish_reason for request, _ in waiting] == ["cancelled"] * 4
    assert running[0][0].finish_reason == "cancelled"
    assert [request.made for request, _ in running[1:]] == [60] * 3


def test_cancels_at_any_time_leave_nothing_behind(service):
    draw = random.Random(0)
    asked = []
    for i in range(60):
        asked.append(ask(service, [draw.randrange(97) for _ in range(draw.randrange(1, 30))], max_tokens=20))
        if draw.random() < 0.5:
            service.cancel(draw.choice(asked)[0])
        if i % 10 == 9:
            asked[-1][1].finished.wait(SECONDS)
    for request, heard in asked:
        assert heard.finished.wait(SECONDS)
        assert heard.times == 1
        assert request.made == 20 or request.finish_reason == "cancelled"


def test_a_full_queue_takes_all_or_none(engine, monkeypatch):
    service = Service(engine, max_queue=3)
    gate = Gate(engine, monkeypatch)
    _, first = ask(service, [1])
    assert gate.reached.wait(SECONDS)
    asked = [ask(service, [2, 2])]  # the first was not let in yet either
    pair = [engine.make_request([9], Sampling()) for _ in range(2)]
    with pytest.raises(Busy, match=r"2 requests wait already: try again in \d+ s") as busy:
        service.submit(pair, Heard())
    assert busy.value.seconds >= 1
    assert service.queued == 2
    asked.append(ask(service, [7]))
    gate.open.set()
    assert service.close(SECONDS)
    assert all(heard.finished.is_set() for heard in (first, *(heard for _, heard in asked)))


def test_who_finds_the_queue_full_is_told_how_long_it_takes_at_the_rate_of_late(engine, monkeypatch):
    now, permits, launch = [1000.0], threading.Semaphore(0), engine.launch
    monkeypatch.setattr("jaxsys.serve.service.time.monotonic", lambda: now[0])
    monkeypatch.setattr(engine, "launch", lambda steps=None: permits.acquire() and launch(steps))
    service = Service(engine, max_queue=4)

    def told():
        with pytest.raises(Busy) as busy:
            ask(service, [9])
        assert service.queued == 4
        return busy.value.seconds

    _, first = ask(service, [1, 2], max_tokens=90)  # keeps the service busy
    while service.queued:
        permits.release()
        first.finished.wait(0.02)
    three = [ask(service, [i], max_tokens=1)[1] for i in range(3)]
    now[0] += 6.0
    while not all(heard.finished.wait(0.02) for heard in three):
        permits.release()
    last = [ask(service, [i], max_tokens=1)[1] for i in range(4)]
    assert told() == 4 * 6.0 / 3
    now[0] += 61.0
    assert told() == 60.0  # nothing was finished since
    permits.release(1000)
    assert all(heard.finished.wait(SECONDS) for heard in [first, *last])
    now[0] += 1000.0
    while permits.acquire(blocking=False):
        pass
    last = [ask(service, [i], max_tokens=1)[1] for i in range(4)]
    assert told() == 1.0  # it was idle, which is not slow
    now[0] += 2.0
    assert told() == 8.0
    permits.release(1000)
    assert service.close(SECONDS)


def test_a_request_that_begins_again_and_again_is_spoken_of_once(engine, monkeypatch, caplog):
    monkeypatch.setattr(engine.scheduler, "new_weights", "restart")
    params, launch, published = engine.live._lease.params, engine.launch, []

    def trained(max_steps=None):
        if len(published) < 20:
            published.append(engine.live.publish(params))
        return launch(max_steps)

    monkeypatch.setattr(engine, "launch", trained)
    service = Service(engine)
    asked = [ask(service, [1, 2, i], max_tokens=12)[0] for i in range(2)]
    assert service.close(SECONDS)
    assert [request.made for request in asked] == [12, 12]
    (said,) = caplog.messages
    assert said.startswith("a request began again 8 times as the weights changed") and "\n" not in said


def run_in_thread(service, count, **settings):
    """What the process itself asks, on its way: (thread, requests)."""
    requests = [
        service.engine.make_request([i, 8, 9], Sampling(**{"temperature": 0.0} | settings)) for i in range(count)
    ]
    thread = threading.Thread(target=service.run, args=[requests])
    thread.start()
    return thread, requests


def test_what_the_process_asks_itself_counts_for_no_limit_and_no_metric(engine, monkeypatch):
    reported = []
    service = Service(engine, max_queue=2, finished=lambda request, times: reported.append(request))
    gate = Gate(engine, monkeypatch)
    thread, own = run_in_thread(service, 40, max_tokens=3)
    assert gate.reached.wait(SECONDS)
    assert service.active == 40
    assert (service.queued, service.running) == (0, 0)
    asked = [ask(service, [1, i]) for i in range(2)]
    assert service.queued == 2
    with pytest.raises(Busy, match="2 requests wait already"):
        ask(service, [1, 2])
    gate.open.set()
    thread.join(SECONDS)
    assert service.close(SECONDS)
    assert [request.made for request in own] == [3] * 40
    assert {id(request) for request in reported} == {id(request) for request, _ in asked}


def test_what_the_process_asks_itself_takes_its_own_share(engine):
    share = DeviceShare({"train": 0.5, "serve": 0.5})
    train, serve = share.parties["train"], share.parties["serve"]
    service = Service(engine, share=share)
    thread, _ = run_in_thread(service, 5, max_tokens=20)
    thread.join(SECONDS)
    assert train.used > 0
    assert (serve.used, serve.turns) == (0.0, 0)
    _, heard = ask(service, [1, 2, 3], max_tokens=20)
    assert heard.finished.wait(SECONDS)
    assert serve.used > 0
    asked = [ask(service, [i, 5], max_tokens=90) for i in range(12)]
    for _ in range(3):  # with clients meanwhile, and training goes on after it
        thread, own = run_in_thread(service, 2, max_tokens=2)
        thread.join(SECONDS)
        assert [request.made for request in own] == [2, 2]
        with share.turn("train"):
            pass
    assert service.close(SECONDS)
    assert all(request.made == 90 for request, _ in asked)


def test_an_engine_that_fails_is_heard_of_by_all():
    engine = make_engine(kv_bytes=1 << 19)
    launch, steps = engine.launch, []

    def fails(max_steps=None):
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("the device is gone")
        return launch(max_steps)

    engine.launch = fails
    service = Service(engine)
    asked = [engine.make_request([i, 2], Sampling(max_tokens=50)) for i in range(8)]
    heard = {request: Heard() for request in asked}
    service.submit(asked, lambda request: heard[request](request))
    for each in heard.values():
        assert each.finished.wait(SECONDS)
        assert each.times == 1
    assert {request.finish_reason for request in asked} == {"cancelled"}
    assert str(service.error) == "the device is gone"
    with pytest.raises(Closed, match="the engine failed: the device is gone"):
        ask(service, [1])
    assert not service.close(SECONDS)
    assert engine.scheduler.pages[0].used == 0


def test_closing_waits_for_those_who_run_and_takes_no_more(engine, monkeypatch):
    service = Service(engine)
    gate = Gate(engine, monkeypatch)
    request, _ = ask(service, [1, 2], max_tokens=50)
    assert gate.reached.wait(SECONDS)
    done = []
    closer = threading.Thread(target=lambda: done.append(service.close(SECONDS)))
    closer.start()
    while True:
        try:
            ask(service, [3], max_tokens=1)
        except Closed as closed:
            assert str(closed) == "the server is shutting down"
            break
    gate.open.set()
    closer.join()
    assert done == [True]
    assert request.made == 50


def test_closing_at_once_cancels(engine, monkeypatch):
    service = Service(engine)
    gate = Gate(engine, monkeypatch)
    asked = [ask(service, [i, 2], max_tokens=90) for i in range(6)]
    assert gate.reached.wait(SECONDS)
    threading.Timer(0.2, gate.open.set).start()
    assert not service.close()
    assert {request.finish_reason for request, _ in asked} == {"cancelled"}
    assert all(heard.times == 1 for _, heard in asked)


def test_what_there_is_nothing_to_compute_of_finishes_at_once(service):
    request, heard = ask(service, [5], max_tokens=0, prompt_logprobs=True)
    assert heard.finished.wait(SECONDS)
    assert (request.finish_reason, request.made) == ("length", 0)
