"""What Prometheus is told: requests, tokens, and how long both took."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from prefixkit.serving.request import Progress

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_EACH = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "prefixkit_requests", "Requests, by route and status.", ["route", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("prefixkit_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.written_tokens = Counter("prefixkit_written_tokens", "Tokens written.", registry=self.registry)
        self.first_token = Histogram(
            *("prefixkit_time_to_first_token_seconds", "From the request on, for each prompt."),
            buckets=_FIRST,
            registry=self.registry,
        )
        self.each_token = Histogram(
            *("prefixkit_time_per_token_seconds", "Behind the first token, the mean of each answer."),
            buckets=_EACH,
            registry=self.registry,
        )

    def watch(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Tell what `value` gives whenever it is asked for."""
        Gauge(f"prefixkit_{name}", meaning, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class Stopwatch:
    """Times and counts the answers to one request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._began = metrics, time.perf_counter()
        self._first: dict[int, float] = {}
        self._written: dict[int, int] = {}

    def see(self, index: int, progress: Progress) -> None:
        """Take note of a token."""
        now = time.perf_counter()
        if index not in self._first:
            self._first[index] = now
            self._metrics.first_token.observe(now - self._began)
        self._written[index] = self._written.get(index, 0) + 1
        if progress.completion is not None:
            self._finish(index, now - self._first[index], progress)

    def stop(self) -> None:
        """Count also what was written of answers that nobody waits for any more."""
        self._metrics.written_tokens.inc(sum(self._written.values()))
        self._written.clear()

    def _finish(self, index: int, seconds: float, progress: Progress) -> None:
        assert progress.completion is not None
        steps = self._written.pop(index) - 1
        self._metrics.prompt_tokens.inc(progress.completion.prompt_tokens)
        self._metrics.written_tokens.inc(len(progress.completion.token_ids))
        if steps:
            self._metrics.each_token.observe(seconds / steps)
