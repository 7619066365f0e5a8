"""What the server tells Prometheus: a registry of its own, read when it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxsys.serve.engine import Engine
from jaxsys.serve.request import Request
from jaxsys.serve.service import Service, Times

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Histograms of finished requests, counts of calls, and what the engine's own books say."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._first = Histogram(
            "jaxsys_time_to_first_token_seconds", "From the call to its first token", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._token = Histogram(
            "jaxsys_time_per_output_token_seconds", "Between the tokens after the first, their mean in a request",
            buckets=_TOKEN_SECONDS, registry=registry,
        )  # fmt: skip
        self._whole = Histogram(
            "jaxsys_request_seconds", "From the call to the last token", buckets=_SECONDS, registry=registry
        )
        self._ends = Counter("jaxsys_requests", "Requests, by how they ended", ["finish_reason"], registry=registry)
        self._calls = Counter("jaxsys_http_calls", "Calls, by path and status", ["path", "status"], registry=registry)

    def watch(self, service: Service) -> None:
        """Adds what the books of the service's engine say."""
        self._registry.register(_Books(service))

    def add(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Adds what others keep books of, such as the run whose weights serve; called at each scrape."""
        self._registry.register(_Others(collect))

    def finished(self, request: Request, times: Times) -> None:
        """Counts a request that is finished."""
        self._ends.labels(request.finish_reason).inc()
        if times.first is not None and times.last is not None:
            self._first.observe(times.first - times.came)
            self._whole.observe(times.last - times.came)
            if request.made > 1:
                self._token.observe((times.last - times.first) / (request.made - 1))

    def called(self, path: str, status: int) -> None:
        """Counts a call of HTTP."""
        self._calls.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Others(Collector):
    """What a function gives."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]):
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()


class _Books(Collector):
    """Gauges and counters that the engine and the service keep anyway."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        engine: Engine = self._service.engine
        pages, counts = engine.scheduler.pages, engine.scheduler.counts
        for name, what, value in (
            ("requests_waiting", "Requests in the queue", self._service.queued),
            ("requests_running", "Requests in the batch", self._service.running),
            ("kv_pages", "Pages of the KV pool", sum(each.count - 1 for each in pages)),
            ("kv_pages_used", "Pages of the KV pool that requests hold", sum(each.used for each in pages)),
            (
                "kv_pages_cached",
                "Pages that nobody holds and that can be used again",
                sum(each.cached for each in pages),
            ),
            ("kv_pages_host", "Pages in host memory", sum(each.hosted for each in pages)),
            ("weight_version", "Of the weights that serve", engine.live.version),
        ):
            yield GaugeMetricFamily(f"jaxsys_{name}", what, value)
        for name, what, value in (
            ("prompt_tokens_computed", "Tokens whose keys and values were computed", counts.computed),
            ("prompt_tokens_reused", "Tokens whose keys and values were there already", counts.reused),
            ("generated_tokens", "Tokens made", counts.made),
            ("preemptions", "Times that a request had to leave the pool", counts.preempted),
        ):
            yield CounterMetricFamily(f"jaxsys_{name}", what, value)
