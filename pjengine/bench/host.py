"""What the host does for a step (schedule, pack, read, update), with executables that do nothing."""

from __future__ import annotations

import functools
import time
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.batch import Bucket
from pjengine.config import EngineConfig
from pjengine.engine import Engine
from pjengine.engine_info import EngineInfo
from pjengine.errors import ConfigError
from pjengine.executables import Executable, open_store
from pjengine.kv_cache import CacheGroup, KVCacheManager
from pjengine.limits import limits_of
from pjengine.model_runner import ModelRunner
from pjengine.models.loading import model_of
from pjengine.models.sources import resolve
from pjengine.request import Request
from pjengine.sampling_batch import SamplerKey
from pjengine.sampling_params import SamplingParams
from pjengine.scheduler import Scheduler
from pjengine.step_inputs import KVCache
from pjengine.step_programs import RunnerShape, StepPrograms, gpu_buckets

_WARM_UP = 30  # steps: prompts are computed, tables filled


class IdleExecutables:
    """In place of a `Compilation`: every executable is ready, and answers at once with what it was given."""

    finished = True

    def wait(self) -> None:
        pass

    def cancel(self) -> None:
        pass

    def get(self, key: Hashable) -> Executable:
        return self[key]

    def __getitem__(self, key: Hashable) -> Executable:
        if isinstance(key, Bucket):
            return Executable(_forward, 0, 0)
        rows = key.rows if isinstance(key, SamplerKey) else 0
        return Executable(functools.partial(_sample, jnp.full(rows, 7, jnp.int32)), 0, 0)


def _forward(params: Any, cache: Any, tables: Any, tail: Any, packed: np.ndarray) -> Any:
    return None, None, cache, tables


def _sample(tokens: jax.Array, logits: Any, state: Any, packed: np.ndarray) -> Any:
    return tokens, state


def host(config: EngineConfig, batch: int, steps: int, params: SamplingParams) -> dict[str, Any]:
    """Milliseconds of one decode step on the host, for the model's sizes and a GPU's defaults.

    Args:
      batch: sequences, of 20 to 400 prompt tokens.
      steps: to time, after the prompts are computed.
    """
    module, model = model_of(resolve(config.model, "dummy"))
    limits = limits_of(config, model.max_position_embeddings, gpu=True)
    if batch > limits.max_num_seqs:
        raise ConfigError(f"batch: expected at most max_num_seqs, {limits.max_num_seqs}, got {batch}")
    longest = min(400, limits.window - _WARM_UP - steps - 1)
    if longest < 20:
        raise ConfigError(f"steps: {steps} do not fit into the model's window of {limits.window} tokens; time fewer")
    windows = tuple(dict.fromkeys(spec.window for spec in module.cache_specs(model)))
    shape = RunnerShape(
        buckets=gpu_buckets(limits.max_num_seqs, limits.step_tokens),
        slots=limits.max_num_seqs,
        max_pages=-(-limits.window // limits.page_size),
        page_size=limits.page_size,
        groups=len(windows),
        vocab_size=model.vocab_size,
        backend="reference",
    )
    programs = StepPrograms(module, model, None, KVCache((), ()), shape)
    runner = ModelRunner(programs, IdleExecutables(), IdleExecutables, open_store("", ()), None, frozenset())
    pages = 2 + batch * -(-(longest + _WARM_UP + steps) // limits.page_size)
    cache = KVCacheManager([CacheGroup(pages, w) for w in windows], limits.page_size, config.enable_prefix_caching)
    info = EngineInfo(config.model, "generate", model.vocab_size, limits.window)
    engine = Engine(info, Scheduler(cache, limits.max_num_seqs, limits.step_tokens, shape.step_sizes), runner)
    random = np.random.default_rng(0)
    for i in range(batch):
        prompt = random.integers(0, model.vocab_size, int(random.integers(20, longest + 1))).tolist()
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    seconds = []
    for i in range(_WARM_UP + steps):
        started = time.perf_counter()
        outputs = engine.step()
        if i >= _WARM_UP:
            seconds.append(time.perf_counter() - started)
            if len(outputs) != batch:
                raise RuntimeError(f"{batch} sequences run, {len(outputs)} tokens came")
    return {
        "batch": batch,
        "window": limits.window,
        "median_ms": 1e3 * float(np.median(seconds)),
        "p90_ms": 1e3 * float(np.percentile(seconds, 90)),
    }
