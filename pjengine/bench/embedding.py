"""Throughput of an embedding engine, the latency of a single query, and latencies under open-loop load, in process."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import numpy as np

from pjengine.bench.workloads import Item, fill
from pjengine.embedding_engine import EmbeddingEngine
from pjengine.offline_run import FEED
from pjengine.request import Request

_QUERY_TOKENS = 12  # the median of the queries workload
_LOAD = 0.6  # of the throughput, offered under open-loop load
SUSTAINED = 0.95  # share of the offered load that counts as kept up with
SECONDS = 1.0  # of each load, about
MOST_REQUESTS, FEWEST_REQUESTS = 16_000, 100


@dataclasses.dataclass(frozen=True)
class LoadPoint:
    """One policy under one load: requests per second, and milliseconds from a request's arrival to its vector."""

    policy: str
    offered: float
    throughput: float
    p50_ms: float
    p90_ms: float
    p99_ms: float

    @property
    def sustained(self) -> bool:
        return self.throughput >= SUSTAINED * self.offered


def run(engine: EmbeddingEngine, prompts: list[list[int]]) -> float:
    """Seconds from the first request added to the last vector read."""
    started = time.perf_counter()
    added = count = 0
    while added < len(prompts) or engine.has_work:
        for prompt in prompts[added : added + FEED]:
            engine.add(Request(request_id=str(added), prompt_token_ids=prompt))
            added += 1
        count += len(engine.step())
    if count != len(prompts):
        raise RuntimeError(f"{len(prompts)} vectors were asked for, {count} came")
    return time.perf_counter() - started


def open_loop(
    engine: EmbeddingEngine, prompts: list[list[int]], rate: float, policy: str = "", seed: int = 0
) -> LoadPoint:
    """Poisson arrivals at `rate` per second, whatever has come back by then; the prompts again and again.

    The last one comes at its expected time: few random gaps would be another load than the one that is reported.
    """
    count = int(np.clip(rate * SECONDS, FEWEST_REQUESTS, min(MOST_REQUESTS, engine.max_waiting)))
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(size=count))
    due = (time.monotonic() + arrivals * (count / rate / arrivals[-1])).tolist()
    start, sent = due[0], 0
    latencies: list[float] = []
    while len(latencies) < count:
        now = time.monotonic()
        while sent < count and due[sent] <= now:
            ids = prompts[sent % len(prompts)]
            engine.add(Request(request_id=str(sent), prompt_token_ids=ids, arrival_time=due[sent]))
            sent += 1
        if engine.has_work:
            latencies += [output.timings.finished for output in engine.step() if output.timings is not None]
        elif due[sent] - now > 2e-4:
            time.sleep(1e-4)
    seconds = time.monotonic() - start
    p50, p90, p99 = (1e3 * float(x) for x in np.percentile(latencies, (50, 90, 99)))
    return LoadPoint(policy, rate, count / seconds, p50, p90, p99)


def embed(engine: EmbeddingEngine, work: list[Item]) -> dict[str, Any]:
    """The second of two runs over the workload, the median of 50 queries one by one, and latencies under open load."""
    prompts = [item.prompt_token_ids for item in work]
    run(engine, prompts)
    before = engine.stats()
    seconds = run(engine, prompts)
    after = engine.stats()
    tokens = sum(map(len, prompts))
    query = fill([min(_QUERY_TOKENS, engine.info.max_model_len)], engine.info.vocab_size)
    single = [run(engine, query) for _ in range(60)][10:]
    load = open_loop(engine, prompts, _LOAD * len(prompts) / seconds)
    return {
        "requests": len(prompts),
        "tokens": tokens,
        "seconds": seconds,
        "requests_per_second": len(prompts) / seconds,
        "tokens_per_second": tokens / seconds,
        "share_of_real_tokens": tokens / (after.padded_tokens - before.padded_tokens),
        "batch_tokens": engine.runner.budget,
        "single_query_ms_p50": 1e3 * statistics.median(single),
        "open_loop_per_second": load.throughput,
        "open_loop_ms_p50": load.p50_ms,
        "open_loop_ms_p99": load.p99_ms,
    }
