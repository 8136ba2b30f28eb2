"""Prometheus series: the engine's latest report, and what the API processes see of each request."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator

from prometheus_client import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from pjengine.metrics import Stats
from pjengine.queue.client_link import QueueStatus
from pjengine.request import Output
from pjengine.serving.shared_counters import SharedCounters

# (series, field of Stats, help); a counter's series gets its `_total` from prometheus_client.
_GAUGES = (
    ("pjengine_requests_running", "running", "Sequences in the running batch."),
    ("pjengine_requests_waiting", "waiting", "Sequences that wait for a place in it."),
    ("pjengine_kv_cache_usage_ratio", "kv_usage", "Share of KV pages held by sequences, 0 to 1."),
    ("pjengine_kv_cache_used_pages", "used_pages", "KV pages held by sequences."),
    ("pjengine_kv_cache_total_pages", "total_pages", "KV pages in all."),
    ("pjengine_kv_cache_reusable_pages", "cached_pages", "Free KV pages that still hold a cached prefix."),
    ("pjengine_batch_budget_tokens", "batch_budget", "Tokens of a full batch of texts to embed; 0: generates."),
    ("pjengine_knee_tokens", "knee_tokens", "Tokens at which the device was found saturated; 0: not measured."),
    ("pjengine_knee_seconds", "knee_seconds", "Time of a batch of so many tokens."),
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
# Of a queue that workers share: (series, counter of the queue's scripts, help).
_QUEUE_COUNTERS = (
    ("pjengine_queue_submitted", "submitted", "Items put into the queue."),
    ("pjengine_queue_answered", "answered", "Items that a worker answered."),
    ("pjengine_queue_claims", "claims", "Batches claimed by workers."),
    ("pjengine_queue_claimed_tokens", "claimed_tokens", "Tokens in them."),
    ("pjengine_queue_redelivered", "redelivered", "Items that went back because their worker died or failed."),
    ("pjengine_queue_lapsed_claims", "lapsed_claims", "Batches whose worker said nothing more."),
    ("pjengine_queue_stale_answers", "stale_answers", "Answers of items that were no longer that worker's, dropped."),
    ("pjengine_queue_expired", "expired", "Items answered with a timeout."),
    ("pjengine_queue_poisoned", "poisoned", "Items given up because worker after worker died of them."),
    ("pjengine_queue_cancelled", "cancelled", "Items dropped because their client left."),
    ("pjengine_queue_abandoned", "abandoned", "Items dropped because their server was gone."),
    ("pjengine_queue_refused", "refused", "Items refused because the queue was full."),
)
_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# (series, help, upper bounds in seconds)
_HISTOGRAMS = (
    ("pjengine_time_to_first_token_seconds", "From a request's arrival to its first token.", _LATENCY_BUCKETS),
    ("pjengine_inter_token_latency_seconds", "Between a sequence's tokens.", _LATENCY_BUCKETS),
    ("pjengine_request_latency_seconds", "From a request's arrival to its end.", _DURATION_BUCKETS),
    ("pjengine_request_queue_seconds", "From a request's arrival to its first step.", _DURATION_BUCKETS),
)
_FINISH_REASONS = ("stop", "length", "abort", "error")
# Of a process: for each histogram its buckets, that above all bounds, and the sum; then the finish reasons.
NUM_COUNTERS = sum(len(bounds) + 2 for _, _, bounds in _HISTOGRAMS) + len(_FINISH_REASONS)


class _Histogram:
    """One histogram's part of a process's counters."""

    def __init__(self, counters: SharedCounters, offset: int, name: str, help_text: str, bounds: tuple[float, ...]):
        self.end = offset + len(bounds) + 2
        self._own = counters.own
        self._offset = offset
        self._name, self._help = name, help_text
        self._bounds = bounds

    def observe(self, value: float, count: int = 1) -> None:
        """`count` observations of `value`."""
        self._own[self._offset + bisect.bisect_left(self._bounds, value)] += count
        self._own[self.end - 1] += value * count

    def family(self, total: list[float]) -> HistogramMetricFamily:
        below = itertools.accumulate(total[self._offset : self.end - 1])
        les = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(les, below, strict=True))
        return HistogramMetricFamily(self._name, self._help, buckets=buckets, sum_value=total[self.end - 1])


class ServerMetrics:
    """All series of one server: the engine's latest report, and what its API processes counted together.

    Args:
      stats: gives the engine's latest report.
      counters: NUM_COUNTERS for each process.
      model: the served name; version: pjengine's.
      queue: gives the status of the queue that workers share; None where there is none.
    """

    def __init__(
        self,
        stats: Callable[[], Stats],
        counters: SharedCounters,
        model: str,
        version: str,
        queue: Callable[[], QueueStatus | None] = lambda: None,
    ):
        self._stats = stats
        self._queue = queue
        self._counters = counters
        self._labels = {"model": model, "version": version}
        histograms: list[_Histogram] = []
        for name, help_text, bounds in _HISTOGRAMS:
            offset = histograms[-1].end if histograms else 0
            histograms.append(_Histogram(counters, offset, name, help_text, bounds))
        self._histograms = histograms
        self.first_token, self.inter_token, self.end_to_end, self.queued = histograms
        self._finished_at = {reason: histograms[-1].end + i for i, reason in enumerate(_FINISH_REASONS)}

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self)

    def timer(self, arrival: float) -> SequenceTimer:
        """For one sequence that came in at `arrival` (`time.monotonic()`)."""
        return SequenceTimer(self, arrival)

    def finished(self, reason: str) -> None:
        self._counters.own[self._finished_at[reason]] += 1

    def collect(self) -> Iterator[Metric]:
        """The series as of now, for prometheus_client."""
        stats, total = self._stats(), self._counters.total()
        for name, field, help_text in _GAUGES:
            yield GaugeMetricFamily(name, help_text, value=getattr(stats, field))
        for name, field, help_text in _COUNTERS:
            yield CounterMetricFamily(name, help_text, value=getattr(stats, field))
        if (queue := self._queue()) is not None:
            yield from _queue_series(queue)
        for histogram in self._histograms:
            yield histogram.family(total)
        finished = CounterMetricFamily(
            "pjengine_requests_finished", "Sequences that ended, by reason.", labels=["finish_reason"]
        )
        for reason, at in self._finished_at.items():
            finished.add_metric([reason], total[at])
        yield finished
        info = GaugeMetricFamily("pjengine_info", "What is served; always 1.", labels=list(self._labels))
        info.add_metric(list(self._labels.values()), 1)
        yield info


def _queue_series(queue: QueueStatus) -> Iterator[Metric]:
    waiting = GaugeMetricFamily("pjengine_queue_waiting", "Items that wait, by class.", labels=["class"])
    waiting.add_metric(["query"], queue.queries)
    waiting.add_metric(["document"], queue.documents)
    yield waiting
    yield GaugeMetricFamily("pjengine_queue_claimed", "Items that workers hold.", value=queue.claimed)
    yield GaugeMetricFamily("pjengine_queue_workers", "Workers that are alive.", value=queue.workers)
    for name, counter, help_text in _QUEUE_COUNTERS:
        yield CounterMetricFamily(name, help_text, value=queue.counters.get(counter, 0))


class SequenceTimer:
    """Turns a sequence's outputs into observations."""

    def __init__(self, metrics: ServerMetrics, arrival: float):
        self._metrics = metrics
        self._arrival = arrival
        self._last: float | None = None
        self._queued = False

    def output(self, output: Output, now: float) -> None:
        """An output that arrived at `now`."""
        metrics = self._metrics
        if output.timings is not None and not self._queued:  # the first one's; the last one has them too
            self._queued = True
            metrics.queued.observe(output.timings.queued)
        if count := len(output.token_ids):
            if self._last is None:
                metrics.first_token.observe(now - self._arrival)
            else:  # tokens that came together share the time they took
                metrics.inter_token.observe((now - self._last) / count, count)
            self._last = now

    def end(self, reason: str, now: float) -> None:
        self._metrics.end_to_end.observe(now - self._arrival)
        self._metrics.finished(reason)
