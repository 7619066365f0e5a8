"""How the processes of a job agree: all-gather of small JSON values between host threads.

Nothing here launches a device program, so background threads may use it. ``SingleProcess`` is the
one-process case; ``JaxCoordinator`` uses the key-value store of ``jax.distributed``.
"""

from __future__ import annotations

import functools
import json
import socket
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax

from parallelism.multihost import job, store

T = TypeVar("T")

# A peer may tokenise, or write to a slow disk, for hours; one that is dead is for ``liveness`` to find.
TIMEOUT_SECONDS = 24 * 3600


class PeerError(RuntimeError):
    """Another process of the job failed in a step that all take together."""


class Coordinator(Protocol):
    """index, count: this process and how many there are."""

    index: int
    count: int

    def gather(self, channel: str, value: Any) -> list[Any]:
        """Every process's JSON value, by process index; also a barrier.

        All processes call a channel equally often and in the same order; channels are independent of each other.
        """

    def tell(self, name: str, value: Any) -> None:
        """Leave a JSON value for ``told`` in all processes, in place of the one before."""

    def told(self, name: str) -> Any:
        """What was told last by that name; None if nothing was yet."""


class SingleProcess:
    """The coordinator of a job of one process."""

    index, count = 0, 1

    def __init__(self) -> None:
        self._told: dict[str, Any] = {}

    def gather(self, channel: str, value: Any) -> list[Any]:
        return [value]

    def tell(self, name: str, value: Any) -> None:
        self._told[name] = value

    def told(self, name: str) -> Any:
        return self._told.get(name)


class JaxCoordinator:
    """Gathers through the coordination service that ``jax.distributed.initialize`` connected to."""

    def __init__(self) -> None:
        self._client: Any = store()
        self.index, self.count = job()
        self._calls: dict[str, int] = defaultdict(int)

    def gather(self, channel: str, value: Any) -> list[Any]:
        call = self._calls[channel]
        self._calls[channel] += 1
        self._client.key_value_set(self._key(channel, call, self.index), json.dumps(value))
        values = [
            json.loads(self._client.blocking_key_value_get(self._key(channel, call, i), TIMEOUT_SECONDS * 1000))
            for i in range(self.count)
        ]
        if call:
            # Everybody has entered this call, so everybody has read the one before.
            self._client.key_value_delete(self._key(channel, call - 1, self.index))
        return values

    def tell(self, name: str, value: Any) -> None:
        self._client.key_value_set(f"jaxsys/told/{name}", json.dumps(value), True)

    def told(self, name: str) -> Any:
        try:
            return json.loads(self._client.key_value_try_get(f"jaxsys/told/{name}"))
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None

    @staticmethod
    def _key(channel: str, call: int, index: int) -> str:
        return f"jaxsys/gather/{channel}/{call}/{index}"


@functools.cache
def default_coordinator() -> Coordinator:
    """The coordinator of this process: one for all uses, since keys of the store are used once."""
    return SingleProcess() if job()[1] == 1 else JaxCoordinator()


def together(coordinator: Coordinator, channel: str, work: Callable[[], T]) -> list[T]:
    """Run ``work`` (whose result is JSON) in every process and gather the results; if it fails in one, it fails in all.

    Raises this process's own exception, or PeerError quoting that of another.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as e:
        error = e
    outcomes = coordinator.gather(channel, {"error": str(error) if error else None, "result": result})
    if error:
        raise error
    for index, outcome in enumerate(outcomes):
        if outcome["error"] is not None:
            raise PeerError(f"process {index}: {outcome['error']}")
    return [outcome["result"] for outcome in outcomes]


def in_turns(coordinator: Coordinator, channel: str, work: Callable[[], T]) -> T:
    """``work`` in process 0, then in one process of each other host, then in the rest; returns this process's result.

    For what leaves something on a disk that the next can use: it is made once where all share the disk, and once a
    host where they do not. Fails in all if it fails in one, like ``together``.
    """
    hosts = coordinator.gather(channel, socket.gethostname())
    index = coordinator.index
    mine = 0 if index == 0 else 1 if hosts.index(hosts[index]) == index else 2
    results: list[T] = []

    def turn(now: int) -> None:
        if now == mine:
            results.append(work())

    for now in range(3):
        together(coordinator, channel, functools.partial(turn, now))
    return results[0]
