"""Work of several threads in order, a few ahead."""

import threading

import pytest

from checkpoint.ahead import THREADS, in_order


def test_what_is_done_behind_a_slow_one_waits_and_threads_go_on():
    first, begun, done = threading.Event(), [], threading.Semaphore(0)

    def work(n):
        begun.append(n)
        if n == 0:
            assert first.wait(30)
        done.release()
        return n

    found = in_order(work, range(100), 2 * THREADS)
    taken = []
    taker = threading.Thread(target=lambda: taken.extend(found))
    taker.start()
    for _ in range(2 * THREADS - 1):
        assert done.acquire(timeout=30)
    assert sorted(begun) == list(range(2 * THREADS)) and not taken
    first.set()
    taker.join(30)
    assert taken == list(range(100))


def test_an_error_comes_in_its_place_and_nothing_more_is_begun():
    begun = []

    def work(n):
        begun.append(n)
        return 1 // (n - 3)

    found = in_order(work, range(1000))
    assert [next(found) for _ in range(3)] == [-1, -1, -1]
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert len(begun) <= 4 + THREADS
