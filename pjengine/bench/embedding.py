"""Throughput and single-query latency of an embedding engine, in process."""

from __future__ import annotations

import statistics
import time
from typing import Any

from pjengine.bench.workloads import Item, fill
from pjengine.embedding_engine import EmbeddingEngine
from pjengine.request import Request

_QUERY_TOKENS = 12  # the median of the queries workload


def run(engine: EmbeddingEngine, prompts: list[list[int]]) -> float:
    """Seconds from the first request added to the last vector read."""
    started = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt))
    count = 0
    while engine.has_work:
        count += len(engine.step())
    if count != len(prompts):
        raise RuntimeError(f"{len(prompts)} vectors were asked for, {count} came")
    return time.perf_counter() - started


def embed(engine: EmbeddingEngine, work: list[Item]) -> dict[str, Any]:
    """The second of two runs over the workload, and the median of 50 queries of 12 tokens one by one."""
    prompts = [item.prompt_token_ids for item in work]
    run(engine, prompts)
    seconds = run(engine, prompts)
    tokens = sum(map(len, prompts))
    query = fill([_QUERY_TOKENS], engine.info.vocab_size)
    single = [run(engine, query) for _ in range(60)][10:]
    return {
        "requests": len(prompts),
        "tokens": tokens,
        "seconds": seconds,
        "requests_per_second": len(prompts) / seconds,
        "tokens_per_second": tokens / seconds,
        "single_query_ms_p50": 1e3 * statistics.median(single),
    }
