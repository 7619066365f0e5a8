"""What processes do in turns: threads stand in for them."""

import threading

import pytest

from parallelism import coordinator
from parallelism.coordinator import PeerError, in_turns


class Threads:
    """The coordinators of ``count`` threads of one process."""

    def __init__(self, count):
        self.count, self.barrier, self.values = count, threading.Barrier(count, timeout=20), {}

    def of(self, index):
        team = self

        class One:
            count = team.count

            def gather(self, channel, value):
                team.values[index] = value
                team.barrier.wait()
                values = [team.values[i] for i in range(team.count)]
                team.barrier.wait()
                return values

        One.index = index
        return One()


def run(monkeypatch, hosts, work):
    """Results, or errors, of ``work(index)`` in turns on these hosts."""
    here, outcome, team = threading.local(), {}, Threads(len(hosts))
    monkeypatch.setattr(coordinator.socket, "gethostname", lambda: hosts[here.index])

    def one(index):
        here.index = index
        try:
            outcome[index] = in_turns(team.of(index), "x", lambda: work(index))
        except Exception as error:
            outcome[index] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcome[i] for i in range(len(hosts))]


def test_process_0_comes_first_then_one_of_each_other_host_then_the_rest(monkeypatch):
    order = []
    results = run(monkeypatch, ["a", "a", "b", "b", "c"], lambda i: order.append(i) or i * 10)
    assert results == [0, 10, 20, 30, 40]
    assert order[0] == 0 and set(order[1:3]) == {2, 4} and set(order[3:]) == {1, 3}


def test_what_fails_in_the_first_is_not_tried_by_the_rest(monkeypatch):
    tried = []

    def work(index):
        tried.append(index)
        raise ValueError("no disk")

    first, *others = run(monkeypatch, ["a", "a", "b"], work)
    assert tried == [0] and isinstance(first, ValueError)
    assert all(isinstance(error, PeerError) and str(error) == "process 0: no disk" for error in others)


@pytest.mark.parametrize("hosts", [["a"]])
def test_one_process_just_does_it(monkeypatch, hosts):
    assert run(monkeypatch, hosts, lambda i: "done") == ["done"]
