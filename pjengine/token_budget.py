"""How many tokens a batch should have: the knee of the latency-against-tokens curve of a model on a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

SATURATED = 0.97  # share of the best throughput at which a device counts as saturated


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """seconds: of a full batch of so many tokens."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


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
