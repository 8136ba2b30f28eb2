"""How many tokens a batch should have: the knee of the latency-against-tokens curve of a model on a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

SATURATED = 0.97  # share of the best throughput at which a device counts as saturated
_BATCHES = 4  # one behind the other, as under load, whose time is taken
_SLOW = 1.0  # seconds of a batch that nobody wants to be longer: larger ones are not measured


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """seconds: of a full batch of so many tokens."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def measure_curve(sizes: Iterable[int], timed: Callable[[int, int], float]) -> list[CurvePoint]:
    """Latency of batches of each size, up to the first that takes over a second.

    On a CPU the largest shapes of a model with a long window take minutes.

    Args:
      sizes: tokens of a batch.
      timed: seconds of so many batches, the second argument, of a size, the first.
    """
    curve: list[CurvePoint] = []
    for size in sorted(sizes):
        timed(size, 1)  # the first run also loads what it needs
        once = timed(size, 1)
        if once > _SLOW:
            return [*curve, CurvePoint(size, once)]
        curve.append(CurvePoint(size, min(timed(size, _BATCHES) for _ in range(2)) / _BATCHES))
    return curve


def knee(curve: Sequence[CurvePoint]) -> CurvePoint:
    """The smallest batch that saturates the device: up to it more tokens cost next to nothing, past it their price.

    It is the first point with SATURATED of the best throughput: where latency is flat and then grows in proportion, the
    corner of the two. A larger batch makes everyone wait longer and no one faster.

    Args:
      curve: at least one point, in any order.
    """
    best = max(point.rate for point in curve)
    return min((point for point in curve if point.rate >= SATURATED * best), key=lambda point: point.tokens)


def describe(curve: Sequence[CurvePoint]) -> str:
    """The curve in a line, for the log."""
    return ", ".join(f"{p.tokens}: {p.seconds * 1e3:.3g} ms" for p in sorted(curve, key=lambda p: p.tokens))
