"""Embeddings under open-loop load, batched in four ways: what token-count batching is worth."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from pjengine.bench import report
from pjengine.bench.embedding import SECONDS, LoadPoint, open_loop, run
from pjengine.bench.plots import draw_batching
from pjengine.bench.workloads import Item
from pjengine.embedding_engine import Batch, EmbeddingEngine, Runner
from pjengine.request import Request
from pjengine.token_budget import CurvePoint, knee

COUNT = 32  # texts of a batch where batches form by their number
LOADS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.1)  # offered, as shares of what the policy can do
SLOW = 64  # texts are timed first on so few, for a policy that may be a hundred times slower


@dataclasses.dataclass(frozen=True)
class Policy:
    """How batches form. max_rows: texts of a batch; None: as many as its tokens allow. padded: to the longest one."""

    name: str
    max_rows: int | None = None
    padded: bool = False


TOKEN_COUNT = Policy("token count")
ONE_AT_A_TIME = Policy("one at a time", 1)
POLICIES = (
    ONE_AT_A_TIME,
    Policy("request count", COUNT),
    Policy("request count, padded", COUNT, padded=True),
    TOKEN_COUNT,
)


class _PolicyRunner:
    """A runner with batches of another policy. Padding is computed as tokens are: with masks it would cost the same."""

    def __init__(self, runner: Runner, policy: Policy, longest: int):
        self._runner, self._padded = runner, policy.padded
        self.knee: CurvePoint | None = None
        self.measure = runner.measure
        self.max_rows, self.budget = runner.max_rows, runner.budget
        if policy.max_rows is not None:
            room = max(1, runner.max_tokens // longest)
            self.max_rows, self.budget = min(policy.max_rows, room), runner.max_tokens
        self.max_tokens = runner.max_tokens

    def dispatch(self, requests: list[Request]) -> Batch:
        if self._padded:
            longest = max(len(request.prompt_token_ids) for request in requests)
            requests = [
                msgspec.structs.replace(r, prompt_token_ids=(r.prompt_token_ids + [0] * longest)[:longest])
                for r in requests
            ]
        return self._runner.dispatch(requests)


def with_policy(engine: EmbeddingEngine, policy: Policy, longest: int) -> EmbeddingEngine:
    """The same model with batches of another policy. longest: tokens of the longest text that will come."""
    if policy == TOKEN_COUNT:
        return engine
    return EmbeddingEngine(engine.info, _PolicyRunner(engine.runner, policy, longest), engine.max_waiting)


def capacity(engine: EmbeddingEngine, prompts: list[list[int]]) -> float:
    """Texts per second of a backlog."""
    few = prompts[:SLOW]
    run(engine, few)
    rate = len(few) / run(engine, few)
    count = min(len(prompts), max(SLOW, int(rate * SECONDS)))
    return count / run(engine, prompts[:count])


def compare(engine: EmbeddingEngine, prompts: list[list[int]]) -> list[LoadPoint]:
    """Every policy at several shares of its own capacity."""
    longest = max(map(len, prompts))
    points = []
    for policy in POLICIES:
        candidate = with_policy(engine, policy, longest)
        best = capacity(candidate, prompts)
        points += [open_loop(candidate, prompts, share * best, policy.name) for share in LOADS]
    return points


def summary(points: list[LoadPoint]) -> dict[str, Any]:
    """The highest load that one text at a time keeps up with, and what token-count batching does with no longer p90.

    Empty where one text at a time keeps up with no load, on a machine busy with other work: nothing to compare with.
    """
    singles = [p for p in points if p.policy == ONE_AT_A_TIME.name and p.sustained]
    if not singles:
        return {}
    base = max(singles, key=lambda p: p.offered)
    ours = [p for p in points if p.policy == TOKEN_COUNT.name and p.sustained and p.p90_ms <= base.p90_ms]
    best = max(ours, key=lambda p: p.offered, default=None)
    return {
        "one_at_a_time_per_second": base.throughput,
        "one_at_a_time_p90_ms": base.p90_ms,
        "token_count_per_second": best.throughput if best else 0.0,
        "token_count_p90_ms": best.p90_ms if best else None,
        "ratio": best.throughput / base.throughput if best else 0.0,
    }


def batching(engine: EmbeddingEngine, work: list[Item], path: str, title: str) -> dict[str, Any]:
    """Compares the policies, prints a table of all loads and draws them beside the latency curve.

    Returns: the summary, and the points under "load" and "curve".
    """
    curve = engine.runner.measure()
    prompts = [item.prompt_token_ids for item in work]
    points = compare(engine, prompts * -(-SLOW // len(prompts)))
    rows = [dataclasses.asdict(point) for point in points]
    report.show("load", rows)
    draw_batching(path, title, curve, knee(curve), points)
    found = summary(points)
    if not found:
        print(
            "One text at a time kept up with no load: the device is busy with something else, so nothing is compared."
        )
    return found | {"load": rows, "curve": [dataclasses.asdict(point) for point in curve]}
