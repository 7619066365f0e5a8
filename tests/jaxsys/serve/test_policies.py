"""Who comes first."""

import pytest

from jaxsys.serve.pages import Pages
from jaxsys.serve.policies import FairShare, FirstComeFirstServed
from jaxsys.serve.request import Request
from jaxsys.serve.sampling import Sampling
from jaxsys.serve.scheduler import Scheduler, Size
from jaxsys.serve.simulate import SimulatedExecutor, poisson, serve


def request(number, client="", priority=0, prompt=4, most=4):
    tokens = [number % 50] * prompt
    return Request(prompt, tokens, Sampling(most), 0, client=client, priority=priority, number=number)


@pytest.mark.parametrize("policy", [FirstComeFirstServed, FairShare])
def test_the_urgent_first_then_in_order_of_arrival(policy):
    queue = policy()
    requests = [request(i, priority=p) for i, p in enumerate((1, 0, 1, 0))]
    for r in reversed(requests):
        queue.push(r)
    queue.discard(requests[3])
    queue.push(requests[3])  # as one that ran and had to leave
    order = []
    while (head := queue.head()) is not None:
        order.append(head.number)
        queue.discard(head)
    assert order == [1, 3, 0, 2]
    assert len(queue) == 0


def test_who_was_served_least_is_next():
    queue = FairShare(made=2)
    a, b, c = (request(i, client) for i, client in enumerate("aab"))
    for r in (a, b, c):
        queue.push(r)
    assert queue.head() is a
    queue.discard(a)
    queue.charge(a, 10, 3)
    assert queue.served("a") == 16
    assert queue.head() is c


def test_nobody_saves_up_while_away():
    queue = FairShare()
    busy = [request(i, "busy") for i in range(3)]
    for r in busy:
        queue.push(r)
    queue.charge(busy[0], 100, 0)
    late = request(3, "late")
    queue.push(late)
    assert queue.served("late") == 100


@pytest.mark.parametrize("busy", [False, True])
def test_clients_that_do_not_come_back_are_forgotten(busy):
    queue = FairShare()
    stays = request(0, "stays")
    if busy:
        queue.push(stays)
    for i in range(1, 10_000):
        once = request(i, f"client {i}")
        queue.push(once)
        queue.discard(once)
        queue.charge(once, 1, 0)
        if busy:
            queue.charge(stays, 1, 0)
        queue.end(once)
    assert len(queue._served) < 2500
    if busy:
        assert queue.served("stays") == 9999


def test_who_was_served_more_than_those_who_wait_is_not_forgotten():
    queue = FairShare()
    waits, greedy = request(0, "waits"), request(1, "greedy")
    for r in (waits, greedy):
        queue.push(r)
    queue.charge(greedy, 1000, 0)
    for i in range(2, 5000):
        queue.push(once := request(i, f"client {i}"))
        queue.discard(once)
        queue.end(once)
    queue.discard(greedy)
    queue.end(greedy)
    for i in range(5000, 9000):
        queue.push(once := request(i, f"client {i}"))
        queue.discard(once)
        queue.end(once)
    assert queue.served("greedy") == 1000
    assert len(queue._served) < 2500


def test_a_client_with_few_requests_does_not_wait_behind_one_with_many():
    """Under overload, against first come first served; and both get the same work done."""
    sizes = (Size(1, 1), Size(4, 4), Size(16, 4, queries=4))
    waits, spent = {}, {}
    for policy in (FirstComeFirstServed, FairShare):
        many = [request(i, "many", prompt=20, most=20) for i in range(300)]
        few = [request(1000 + i, "few", prompt=20, most=20) for i in range(10)]
        executor = SimulatedExecutor(8)
        scheduler = Scheduler([Pages(60, 8)], sizes, 4, ordering=policy())
        times = serve(scheduler, executor, poisson(many, 1000.0) + poisson(few, 10.0, seed=1))
        waits[policy] = max(times[r].first - times[r].came for r in few)
        spent[policy] = executor.seconds
    assert waits[FairShare] < waits[FirstComeFirstServed] / 4
    assert spent[FairShare] == pytest.approx(spent[FirstComeFirstServed], rel=0.1)
