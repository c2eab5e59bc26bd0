"""What a server tells Prometheus: /metrics."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from serving.requests import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "zero2all_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
_STATES = {
    "running": "Sequences that are being computed",
    "waiting": "Sequences that wait for room",
    "blocks": "Blocks of the cache",
    "used_blocks": "Blocks of the cache that a request uses",
}
_COUNTS = {
    "prompt_tokens": "Tokens of prompts",
    "cached_tokens": "Tokens of prompts that were found in the cache",
    "new_tokens": "Tokens that were generated",
    "preemptions": "Sequences that had to make room, and are computed again",
    "steps": "Forward passes",
}


class Metrics:
    """Counts of one server, in a registry of its own.

    Args:
        stats: returns the engine's present state.
        num_open: returns the number of open choices.
    """

    def __init__(self, stats: Callable[[], EngineStats], num_open: Callable[[], int]):
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(stats, num_open))
        new = {"registry": self._registry}
        self._http = Counter(_PREFIX + "http_requests", "HTTP requests", ["path", "status"], **new)
        self._finished = Counter(_PREFIX + "choices", "Texts that ended, by reason", ["finish"], **new)
        self._first = Histogram(
            _PREFIX + "time_to_first_token_seconds", "From a request's arrival", buckets=_SECONDS, **new
        )
        self._whole = Histogram(
            _PREFIX + "request_duration_seconds", "From a request's arrival to its last token", buckets=_SECONDS, **new
        )
        self._lengths = Histogram(
            _PREFIX + "answer_tokens", "Tokens of a text", buckets=_TOKENS, **new
        )

    def saw_http(self, path: str, status: int) -> None:
        """Count a request; `path` is one of the server's own, so that nobody can fill the memory with names."""
        self._http.labels(path, str(status)).inc()

    def saw_first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def saw_end(self, seconds: float) -> None:
        self._whole.observe(seconds)

    def saw_choice(self, finish: str, num_tokens: int) -> None:
        self._finished.labels(finish).inc()
        self._lengths.observe(num_tokens)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _OfEngine(Collector):
    """Reads the engine's counts when they are asked for."""

    def __init__(self, stats: Callable[[], EngineStats], num_open: Callable[[], int]):
        self._stats, self._num_open = stats, num_open

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._stats()
        yield GaugeMetricFamily(_PREFIX + "open_choices", "Texts whose requests have not ended", self._num_open())
        for name, help_text in _STATES.items():
            yield GaugeMetricFamily(_PREFIX + name, help_text, getattr(stats, name))
        for name, help_text in _COUNTS.items():
            yield CounterMetricFamily(_PREFIX + name, help_text, getattr(stats, name))
