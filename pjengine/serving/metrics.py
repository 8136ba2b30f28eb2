"""Prometheus series: the engine's latest report, and what this process sees of each request."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from pjengine.metrics import Stats
from pjengine.request import Output

# (series, field of Stats, help); a counter's series gets its `_total` from prometheus_client.
_GAUGES = (
    ("pjengine_requests_running", "running", "Sequences in the running batch."),
    ("pjengine_requests_waiting", "waiting", "Sequences that wait for a place in it."),
    ("pjengine_kv_cache_usage_ratio", "kv_usage", "Share of KV pages held by sequences, 0 to 1."),
    ("pjengine_kv_cache_used_pages", "used_pages", "KV pages held by sequences."),
    ("pjengine_kv_cache_total_pages", "total_pages", "KV pages in all."),
    ("pjengine_kv_cache_reusable_pages", "cached_pages", "Free KV pages that still hold a cached prefix."),
)
_COUNTERS = (
    ("pjengine_prefix_cache_queried_tokens", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    ("pjengine_prefix_cache_hit_tokens", "prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    ("pjengine_preemptions", "preemptions", "Sequences whose pages were taken away, to be recomputed later."),
    ("pjengine_prompt_tokens", "prompt_tokens", "Prompt tokens of admitted sequences."),
    ("pjengine_generation_tokens", "generation_tokens", "Tokens generated."),
    ("pjengine_engine_steps", "steps", "Steps run on the device."),
    ("pjengine_engine_step_tokens", "step_tokens", "Tokens computed in them."),
    ("pjengine_engine_padded_tokens", "padded_tokens", "Tokens of the buckets they ran in: computed ones and padding."),
)
_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_DURATION_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class ServerMetrics:
    """All series of one server, in a registry of their own.

    Args:
      stats: gives the engine's latest report.
      model: the served name; version: pjengine's.
    """

    def __init__(self, stats: Callable[[], Stats], model: str, version: str):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        Gauge("pjengine_info", "What is served; always 1.", ["model", "version"], registry=self._registry).labels(
            model, version
        ).set(1)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _LATENCY_BUCKETS
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Between a sequence's tokens.", _LATENCY_BUCKETS
        )
        self._end_to_end = self._histogram(
            "request_latency_seconds", "From a request's arrival to its last token.", _DURATION_BUCKETS
        )
        self._queued = self._histogram(
            "request_queue_seconds", "From a request's arrival to its first step.", _DURATION_BUCKETS
        )
        self._finished = Counter(
            "pjengine_requests_finished", "Sequences that ended, by reason.", ["finish_reason"], registry=self._registry
        )

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"pjengine_{name}", help_text, buckets=buckets, registry=self._registry)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def timer(self, arrival: float) -> SequenceTimer:
        """For one sequence that came in at `arrival` (`time.monotonic()`)."""
        return SequenceTimer(self, arrival)

    def finished(self, reason: str) -> None:
        self._finished.labels(reason).inc()


class SequenceTimer:
    """Turns a sequence's outputs into observations."""

    def __init__(self, metrics: ServerMetrics, arrival: float):
        self._metrics = metrics
        self._arrival = arrival
        self._last: float | None = None

    def output(self, output: Output, now: float) -> None:
        """An output that arrived at `now`."""
        metrics = self._metrics
        if count := len(output.token_ids):
            if self._last is None:
                metrics._first_token.observe(now - self._arrival)
                if output.timings is not None:  # also of the last output, where the queue is counted already
                    metrics._queued.observe(output.timings.queued)
            else:
                for _ in range(count):  # tokens that came together share the time they took
                    metrics._inter_token.observe((now - self._last) / count)
            self._last = now

    def end(self, reason: str, now: float) -> None:
        self._metrics._end_to_end.observe(now - self._arrival)
        self._metrics.finished(reason)


class _EngineCollector:
    """The engine's report as series, read when Prometheus asks."""

    def __init__(self, stats: Callable[[], Stats]):
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, field, help_text in _GAUGES:
            yield GaugeMetricFamily(name, help_text, value=getattr(stats, field))
        for name, field, help_text in _COUNTERS:
            yield CounterMetricFamily(name, help_text, value=getattr(stats, field))
