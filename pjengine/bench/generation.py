"""Decode, prefill and throughput of a generating engine, in process."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from pjengine.bench.roofline import Roofline
from pjengine.bench.workloads import Item, items
from pjengine.engine import Engine
from pjengine.errors import ConfigError
from pjengine.model_runner import ModelRunner
from pjengine.request import Request
from pjengine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)


@dataclasses.dataclass(frozen=True)
class Run:
    """seconds from the first request added to the last token read; token counts; steps dispatched."""

    seconds: float
    prompt_tokens: int
    output_tokens: int
    steps: int


def run(engine: Engine, work: list[Item], params: SamplingParams = GREEDY) -> Run:
    """All of a workload at once."""
    engine.max_waiting = max(engine.max_waiting, len(work))
    started, steps = time.perf_counter(), engine.stats().steps
    for i, item in enumerate(work):
        asked = _with_length(params, item.output_len)
        engine.add(Request(request_id=f"bench-{i}", prompt_token_ids=item.prompt_token_ids, params=asked))
    tokens = 0
    while engine.has_work:
        tokens += sum(len(output.token_ids) for output in engine.step())
    seconds = time.perf_counter() - started
    expected = sum(item.output_len for item in work)
    if tokens != expected:
        raise RuntimeError(f"the workload asks for {expected} tokens, {tokens} came")
    return Run(seconds, sum(len(item.prompt_token_ids) for item in work), tokens, engine.stats().steps - steps)


def _with_length(params: SamplingParams, length: int) -> SamplingParams:
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    return SamplingParams(**(fields | {"max_tokens": length}))


def decode(
    engine: Engine, batch: int, context: int, steps: int, roofline: Roofline, params: SamplingParams = GREEDY
) -> dict[str, Any]:
    """Milliseconds of one decode step: `steps` steps in which all rows decode and nothing else happens."""
    for timed in (False, True):
        _start_decoding(engine, batch, context, steps, params)
        if not timed:  # the first round asks for the samplers
            engine.step()
            _runner(engine).settle()
        started = time.perf_counter()
        tokens = sum(len(output.token_ids) for _ in range(steps if timed else 1) for output in engine.step())
        seconds = (time.perf_counter() - started) / steps
        for i in range(batch):
            engine.abort(f"bench-{i}")
        while engine.has_work:
            engine.step()
    if tokens != batch * steps:
        raise ConfigError(
            f"batch: the KV cache does not hold {batch} sequences of {context + steps} tokens at once; take fewer, or "
            "a smaller context"
        )
    least = _decode_bytes(engine, batch, context + steps // 2) / roofline.copy_bandwidth
    return {
        "batch": batch,
        "context": context,
        "ms_per_step": 1e3 * seconds,
        "tokens_per_second": batch / seconds,
        "share_of_roofline": least / seconds,
    }


def check_decode(engine: Engine, batch: int, context: int, steps: int) -> None:
    """Raises: ConfigError if `decode` cannot measure this."""
    if batch > engine.scheduler.max_num_seqs:
        raise ConfigError(f"batch: at most max_num_seqs, {engine.scheduler.max_num_seqs}, run at once; got {batch}")
    longest = context + _decoded(engine, batch, context, steps)
    if longest > engine.info.max_model_len:
        raise ConfigError(
            f"context, steps: sequences grow to {longest} tokens; max_model_len is {engine.info.max_model_len}"
        )


def _decoded(engine: Engine, batch: int, context: int, steps: int) -> int:
    """Tokens that a sequence generates: the first rows decode while the last prompts are read, at most a step each
    beside those that their tokens take.
    """
    return steps + batch + batch * context // _runner(engine).step_tokens + 8


def _start_decoding(engine: Engine, batch: int, context: int, steps: int, params: SamplingParams) -> None:
    """Adds `batch` prompts of `context` tokens and returns when each has its first token and nothing is prefilled."""
    asked = _with_length(params, _decoded(engine, batch, context, steps))
    for i, item in enumerate(items([(context, 1)] * batch, engine.info.vocab_size)):
        engine.add(Request(request_id=f"bench-{i}", prompt_token_ids=item.prompt_token_ids, params=asked))
    waiting = {f"bench-{i}" for i in range(batch)}
    while waiting:
        waiting -= {output.request_id for output in engine.step()}


def check_prefill(engine: Engine, length: int) -> None:
    """Raises: ConfigError if `prefill` cannot measure prompts of this length."""
    if length >= engine.info.max_model_len:
        raise ConfigError(
            f"shapes: prompts may have {engine.info.max_model_len - 1} tokens (max_model_len is "
            f"{engine.info.max_model_len}), got {length}"
        )


def prefill(engine: Engine, count: int, length: int, roofline: Roofline) -> dict[str, Any]:
    """Prompt tokens per second of `count` prompts of `length` tokens, one token generated each; the second of two
    runs.
    """
    work = items([(length, 1)] * count, engine.info.vocab_size)
    _runner(engine).settle()
    run(engine, work)
    found = run(engine, work)
    rate = found.prompt_tokens / found.seconds
    least = 2 * _weight_count(engine) * found.prompt_tokens / roofline.gemm_rate
    return {
        "prompts": count,
        "length": length,
        "tokens_per_second": rate,
        "share_of_roofline": least / found.seconds,
    }


def throughput(engine: Engine, work: list[Item]) -> dict[str, Any]:
    """A whole workload, all requests at once, after a short one."""
    half = engine.info.max_model_len // 2
    run(engine, items([(min(128, half), min(8, half))] * 8, engine.info.vocab_size))
    _runner(engine).settle()
    found = run(engine, work)
    return {
        "requests": len(work),
        "seconds": found.seconds,
        "steps": found.steps,
        "prompt_tokens": found.prompt_tokens,
        "output_tokens": found.output_tokens,
        "output_tokens_per_second": found.output_tokens / found.seconds,
        "total_tokens_per_second": (found.prompt_tokens + found.output_tokens) / found.seconds,
        "preemptions": engine.stats().preemptions,
    }


def _runner(engine: Engine) -> ModelRunner:
    if not isinstance(engine.runner, ModelRunner):
        raise TypeError("the benchmark needs an engine with a ModelRunner")
    return engine.runner


def _weight_count(engine: Engine) -> int:
    """Parameters that every token multiplies: all but the embedding table (a tied one multiplies too)."""
    params = _runner(engine).params
    table = params.get("embed") if "lm_head" in params else None
    return sum(x.size for x in jax.tree.leaves(params)) - (table.size if table is not None else 0)


def _decode_bytes(engine: Engine, batch: int, context: int) -> float:
    """Bytes a decode step must read: every weight once, and each sequence's KV."""
    runner = _runner(engine)
    itemsize = np.dtype(jax.tree.leaves(runner.params)[0].dtype).itemsize
    return _weight_count(engine) * itemsize + batch * context * runner.kv_bytes_per_token
