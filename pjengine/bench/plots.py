"""Figures of benchmarks, as PNG files; needs the extra `bench` (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pjengine.bench.embedding import LoadPoint
from pjengine.errors import ConfigError
from pjengine.token_budget import CurvePoint


def require_matplotlib(path: str) -> Any:
    """matplotlib's Figure class.

    Raises: ConfigError where matplotlib is missing, or the path is no PNG file's.
    """
    if not path.endswith(".png"):
        raise ConfigError(f"plot: expected the name of a .png file, got {path!r}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plot: matplotlib is not installed; pip install 'pjengine[bench]'") from error
    return Figure


def draw_batching(
    path: str, title: str, curve: Sequence[CurvePoint], knee: CurvePoint, points: Sequence[LoadPoint]
) -> None:
    """Latency against tokens with the knee; throughput and p90 latency against offered load by policy.

    Raises: ConfigError, as require_matplotlib, or where the file cannot be written.
    """
    figure = require_matplotlib(path)(figsize=(15, 4.5), layout="constrained")
    latency, throughput, tail = figure.subplots(1, 3)
    figure.suptitle(title)
    curve = sorted(curve, key=lambda point: point.tokens)
    latency.loglog([p.tokens for p in curve], [p.seconds * 1e3 for p in curve], "o-")
    latency.axvline(knee.tokens, color="tab:red", linestyle="--", label=f"knee: {knee.tokens} tokens")
    latency.set(xlabel="tokens of a batch", ylabel="latency, ms")
    latency.legend()
    for name in dict.fromkeys(point.policy for point in points):
        mine = [point for point in points if point.policy == name]
        offered = [p.offered for p in mine]
        throughput.loglog(offered, [p.throughput for p in mine], "o-", label=name)
        tail.loglog(offered, [p.p90_ms for p in mine], "o-", label=name)
    throughput.set(xlabel="offered load, texts/s", ylabel="throughput, texts/s")
    tail.set(xlabel="offered load, texts/s", ylabel="p90 latency, ms")
    throughput.legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"plot: {path} cannot be written ({error.strerror})") from error
