"""What a client saw of its requests, and the figures that are made of it. All times are seconds of `time.monotonic`."""

from __future__ import annotations

import collections
import dataclasses
import math
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from pjengine.errors import ConfigError

LATENCIES = ("ttft", "tpot", "itl", "e2el")


@dataclasses.dataclass
class Trace:
    """One request.

    Attributes:
      due: when the workload wanted it sent.
      sent: when it was; later than due where as many as may were in flight, or the client was too slow.
      asked: output tokens asked for.
      arrivals: of each event that brought text.
      finished: when the answer had ended.
      prompt_tokens, output_tokens: as the server counts them.
      error: what went wrong, in words that equal failures share; None: nothing.
      texts: prompts sent.
    """

    due: float
    sent: float = 0.0
    asked: int = 0
    arrivals: array[float] = dataclasses.field(default_factory=lambda: array("d"))
    finished: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    texts: int = 1

    @property
    def ttft(self) -> float | None:
        """Time to first token: from sending, connecting included, to the first event with text."""
        return self.arrivals[0] - self.sent if self.arrivals else None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None where there was but one."""
        if len(self.arrivals) == 0 or self.output_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def e2el(self) -> float:
        """End-to-end latency: from sending to the end of the answer."""
        return self.finished - self.sent


@dataclasses.dataclass(frozen=True)
class Summary:
    """Figures of a run.

    Attributes:
      seconds: from the first request due to the last answer.
      completed, failed: requests.
      early: completed, but with fewer tokens than were asked for.
      rates: per second: requests, texts (where a request has several), good requests (where limits were given), input
        and output tokens, and both.
      latencies: name -> {"mean", "median", "p99"} in ms; a name without a value (tpot of one-token answers) is absent.
      errors: what went wrong -> how often, the most frequent first.
    """

    seconds: float
    completed: int
    failed: int
    early: int
    prompt_tokens: int
    output_tokens: int
    rates: dict[str, float]
    latencies: dict[str, dict[str, float]]
    errors: dict[str, int]


def summarize(traces: Sequence[Trace], limits: dict[str, float] | None = None) -> Summary:
    """The figures of all requests of a run; latencies and tokens are those of the completed ones.

    Args:
      limits: of a good request, ms by name ("ttft", "tpot", "e2el"); None: no goodput is reported.
    """
    good = [t for t in traces if t.error is None]
    errors = collections.Counter(t.error for t in traces if t.error is not None)
    seconds = max(t.finished for t in traces) - min(t.due for t in traces)
    prompt_tokens, output_tokens = sum(t.prompt_tokens for t in good), sum(t.output_tokens for t in good)
    counts: dict[str, float] = {"requests": len(good)}
    if any(t.texts > 1 for t in traces):
        counts["texts"] = sum(t.texts for t in good)
    if limits is not None:
        counts["good requests"] = sum(_within(t, limits) for t in good)
    counts |= {
        "input tokens": prompt_tokens,
        "output tokens": output_tokens,
        "all tokens": prompt_tokens + output_tokens,
    }
    samples: dict[str, Iterable[float | None]] = {
        "ttft": (t.ttft for t in good),
        "tpot": (t.tpot for t in good),
        "itl": (gap for t in good for gap in np.diff(t.arrivals).tolist()),
        "e2el": (t.e2el for t in good),
        "queued": (t.sent - t.due for t in good),
    }
    latencies = {name: found for name, values in samples.items() if (found := _statistics(values))}
    return Summary(
        seconds=seconds,
        completed=len(good),
        failed=len(traces) - len(good),
        early=sum(t.output_tokens < t.asked for t in good),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        rates={name: count / seconds for name, count in counts.items()},
        latencies=latencies,
        errors=dict(errors.most_common()),
    )


def parse_limits(text: str) -> dict[str, float]:
    """ "ttft:200,tpot:50,e2el:5000" as ms by name; ConfigError names the part that is wrong."""
    limits = {}
    for part in text.split(","):
        name, _, value = part.strip().partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = -1.0
        if name not in ("ttft", "tpot", "e2el") or not 0 < limits[name] < math.inf:
            raise ConfigError(f"goodput: expected limits in ms such as ttft:200,tpot:50,e2el:5000, got {part!r}")
    return limits


def _within(trace: Trace, limits: dict[str, float]) -> bool:
    """A latency that a request has not (time per output token of one token) is within every limit."""
    values = {name: getattr(trace, name) for name in limits}
    return all(value is None or 1e3 * value <= limits[name] for name, value in values.items())


def _statistics(values: Iterable[float | None]) -> dict[str, float]:
    """In ms; empty without values."""
    ms = 1e3 * np.array([v for v in values if v is not None])
    if not ms.size:
        return {}
    return {"mean": float(ms.mean()), "median": float(np.median(ms)), "p99": float(np.percentile(ms, 99))}
