"""The `chat` workload through the real scheduler at a GPU's defaults: what its steps compute for nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pjengine.bench.generation import run
from pjengine.bench.workloads import Item, chat_lengths
from pjengine.config import EngineConfig
from pjengine.engine import Engine, StepResult
from pjengine.engine_info import EngineInfo
from pjengine.kv_cache import CacheGroup, KVCacheManager, PageCopy
from pjengine.limits import limits_of
from pjengine.scheduler import Batch, Scheduler
from pjengine.step_programs import RunnerShape, gpu_buckets

FLAT = 192  # tokens up to which a step takes as long as reading the weights (Llama-3.1-8B on an H200)


class Done:
    def __init__(self, rows: int, bucket_tokens: int):
        self.rows, self.bucket_tokens = rows, bucket_tokens

    def read(self) -> StepResult:
        return StepResult(np.ones(self.rows, np.int32), None, {})


class CountingRunner:
    """Notes how many tokens each step has, and how many the smallest bucket that holds it computes."""

    def __init__(self, shape: RunnerShape):
        self.buckets = sorted(shape.buckets, key=lambda b: (b.tokens, not b.decode))
        self.steps: list[tuple[int, int]] = []

    def dispatch(self, batch: Batch, copies: Sequence[PageCopy]) -> Done:
        rows, tokens = len(batch), batch.num_tokens
        bucket = next(
            b for b in self.buckets if b.rows >= rows and b.tokens >= tokens and (batch.decode or not b.decode)
        )
        self.steps.append((tokens, bucket.tokens))
        return Done(rows, bucket.tokens)


def test_padding_takes_less_than_a_twentieth_of_the_time() -> None:
    limits = limits_of(EngineConfig.make("chat"), 16384, gpu=True)
    shape = RunnerShape(
        gpu_buckets(limits.max_num_seqs, limits.step_tokens), limits.max_num_seqs, 256, limits.page_size, 1, 9, "auto"
    )
    cache = KVCacheManager([CacheGroup(15_000)], limits.page_size, prefix_caching=False)
    runner = CountingRunner(shape)
    scheduler = Scheduler(cache, limits.max_num_seqs, limits.step_tokens, shape.step_sizes)
    engine = Engine(EngineInfo("chat", "generate", 9, 16384), scheduler, runner)
    found = run(engine, [Item([5] * prompt, output) for prompt, output in chat_lengths()])
    tokens, padded = np.maximum(np.array(runner.steps), FLAT).sum(axis=0)
    assert 1 - tokens / padded < 0.05
    # The longest text alone takes 1024 steps after its prompt.
    assert 1024 < found.steps < 1250
