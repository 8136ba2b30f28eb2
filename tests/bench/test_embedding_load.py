"""The comparison of batching policies: what each sends to the device, what is made of the figures, and the plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pjengine.bench.embedding import LoadPoint, open_loop
from pjengine.bench.embedding_load import ONE_AT_A_TIME, POLICIES, TOKEN_COUNT, Policy, capacity, summary, with_policy
from pjengine.bench.plots import draw_batching, require_matplotlib
from pjengine.embedding_engine import EmbeddingEngine
from pjengine.engine_info import EngineInfo
from pjengine.errors import ConfigError
from pjengine.request import Request
from pjengine.token_budget import CurvePoint, knee

PROMPTS = [[1] * n for n in (3, 9, 5, 20, 7, 11)] * 20


class Instant:
    """A device that takes no time, and remembers the lengths of its batches."""

    budget, max_rows, max_tokens, knee = 64, 32, 128, None

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def measure(self) -> list[CurvePoint]:
        return [CurvePoint(32, 1e-3), CurvePoint(64, 1e-3), CurvePoint(128, 2e-3)]

    def dispatch(self, requests: list[Request]) -> Done:
        self.batches.append([len(request.prompt_token_ids) for request in requests])
        return Done(len(requests))


class Done:
    bucket_tokens, done = 128, True

    def __init__(self, count: int):
        self.count = count

    def read(self) -> np.ndarray:
        return np.zeros((self.count, 2), np.float32)


def batches_of(policy: Policy) -> list[list[int]]:
    runner = Instant()
    engine = EmbeddingEngine(EngineInfo("instant", "embed", 100, 20, embedding_size=2), runner)  # type: ignore[arg-type]
    assert capacity(with_policy(engine, policy, longest=20), PROMPTS) > 0
    return runner.batches


def test_policies() -> None:
    single, counted, padded, packed = (batches_of(policy) for policy in POLICIES)
    assert {len(batch) for batch in single} == {1}
    assert max(map(len, counted)) == 6, "as many as fit in the largest batch, should all be of the greatest length"
    assert all(len(set(batch)) == 1 for batch in padded)
    assert max(map(sum, padded)) <= Instant.max_tokens
    assert max(map(sum, packed)) <= Instant.budget
    assert max(map(len, packed)) > 6


def test_open_loop_counts_from_the_time_a_request_was_due() -> None:
    engine = EmbeddingEngine(EngineInfo("instant", "embed", 100, 20, embedding_size=2), Instant())  # type: ignore[arg-type]
    point = open_loop(engine, PROMPTS, 2000.0, "any")
    assert (point.policy, point.offered) == ("any", 2000.0)
    assert 0 < point.p50_ms <= point.p90_ms <= point.p99_ms
    assert 1000 < point.throughput < 4000


def test_what_is_offered_is_what_arrives() -> None:
    engine = EmbeddingEngine(EngineInfo("instant", "embed", 100, 20, embedding_size=2), Instant())  # type: ignore[arg-type]
    point = open_loop(engine, PROMPTS, 100.0)  # its 100 random gaps are 18 % longer than 100 expected ones
    assert 0.9 * point.offered < point.throughput < 1.1 * point.offered


def test_summary_compares_at_no_longer_p90() -> None:
    points = [
        LoadPoint(ONE_AT_A_TIME.name, 500, 500, 1, 2, 3),
        LoadPoint(ONE_AT_A_TIME.name, 900, 890, 2, 5, 9),
        LoadPoint(ONE_AT_A_TIME.name, 1200, 990, 100, 200, 300),  # not sustained
        LoadPoint(TOKEN_COUNT.name, 9000, 9000, 2, 4, 5),
        LoadPoint(TOKEN_COUNT.name, 20000, 19900, 4, 6, 8),  # sustained, but slower
    ]
    found = summary(points)
    assert (found["one_at_a_time_per_second"], found["token_count_per_second"]) == (890, 9000)
    assert found["ratio"] == pytest.approx(9000 / 890)
    assert summary(points[2:]) == {}


def test_plot(tmp_path: Path) -> None:
    file = tmp_path / "batching.png"
    curve = Instant().measure()
    points = [LoadPoint(p.name, load, load, 1, 2, 3) for p in POLICIES for load in (100.0, 200.0)]
    draw_batching(str(file), "title", curve, knee(curve), points)
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"plot: expected the name of a \.png file"):
        require_matplotlib("batching.pdf")
    with pytest.raises(ConfigError, match="cannot be written"):
        draw_batching(str(tmp_path / "no" / "x.png"), "title", curve, knee(curve), points)
