"""From options to a running engine: `make_engine(EngineConfig) -> Engine | EmbeddingEngine`."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pjengine.batch import Bucket, forward_layout, init_tables
from pjengine.config import EngineConfig
from pjengine.device_cache import cache_shapes, page_bytes
from pjengine.embedding_engine import EmbeddingEngine
from pjengine.embedding_runner import EmbeddingRunner, embedding_buckets
from pjengine.engine import Engine
from pjengine.engine_info import EngineInfo
from pjengine.executables import open_store, use_compile_cache
from pjengine.kv_cache import CacheGroup, KVCacheManager
from pjengine.limits import Limits, embedding_tokens, limits_of, window_of
from pjengine.memory_plan import RESERVE, MemoryPlan, plan_memory
from pjengine.model_runner import ModelRunner, RunnerShape, forward_function, make_buckets
from pjengine.models.heads import Head
from pjengine.models.loading import choose_dtype, load_source, model_of
from pjengine.models.sources import Source, resolve
from pjengine.models.tasks import head_of
from pjengine.pallas_kernels import describe_backends
from pjengine.sampler import init_state
from pjengine.scheduler import Scheduler
from pjengine.step_inputs import CacheSpec

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model on the device, and where it came from."""

    source: Source
    module: ModuleType
    config: Any
    params: Any
    dtype: jnp.dtype


def make_engine(config: EngineConfig, *, progress: bool = True) -> Engine | EmbeddingEngine:
    """Finds, loads and compiles a model.

    Args:
      progress: draw progress bars on stderr.
    Raises:
      ModelError: the model cannot be found or read.
      ConfigError: an option cannot work with this model.
      OutOfMemory: it does not fit; the message holds the numbers.
      KernelUnavailable: no attention backend can serve it here.
    """
    started = time.monotonic()
    prepare_device(config)
    source = resolve(config.model, config.load_format)
    module, model_config = model_of(source)
    dtype = choose_dtype(source, config.dtype)
    head = head_of(source, module, model_config, config.task)
    params = load_source(source, module, model_config, dtype, head=head, seed=config.seed)
    model = _Model(source, module, model_config, params, dtype)
    seconds = time.monotonic() - started
    # A record's attribute `phase` names what has ended, for those who time the start-up.
    logger.info("loaded %s as %s in %.1f s", config.model, dtype, seconds, extra={"phase": "weights"})
    engine = _make_generator(config, model, progress) if head is None else _make_embedder(config, model, head, progress)
    logger.info("ready in %.1f s: %s", time.monotonic() - started, engine.info, extra={"phase": "cache and tables"})
    return engine


def prepare_device(config: EngineConfig) -> None:
    """Settings that JAX reads when it first touches the device; a program that has done so already keeps its own."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(config.gpu_memory_utilization))
    use_compile_cache(config.compile_cache)


def _make_generator(config: EngineConfig, model: _Model, progress: bool) -> Engine:
    gpu = jax.default_backend() == "gpu"
    specs = model.module.cache_specs(model.config)
    limits = limits_of(config, model.config.max_position_embeddings, gpu=gpu)
    backends = _check_backends(config, model, specs, limits.page_size)
    shape = RunnerShape(
        # On a CPU XLA multiplies a single row ten times slower than eight.
        buckets=make_buckets(limits.max_num_seqs, limits.step_tokens, first=1 if gpu else 8, growth=2 if gpu else 8),
        slots=limits.max_num_seqs,
        max_pages=-(-limits.window // limits.page_size),
        page_size=limits.page_size,
        groups=len(page_bytes(specs, limits.page_size, model.dtype)),
        vocab_size=model.config.vocab_size,
        backend=config.attention_backend,
    )
    plan = _plan(config, model, specs, shape, limits)
    windows = dict.fromkeys(spec.window for spec in specs)
    groups = [CacheGroup(pages, w) for pages, w in zip(plan.pages, windows, strict=True)]
    cache = KVCacheManager(groups, limits.page_size, config.enable_prefix_caching)
    window = min(limits.window, cache.capacity(limits.step_tokens))
    if window < limits.window:
        logger.warning("max_model_len: lowered to %d, the longest sequence that %d pages hold", window, min(plan.pages))
    logger.info("memory: %s", plan, extra={"phase": "memory plan"})
    runner = ModelRunner(
        model.module,
        model.config,
        model.params,
        cache_shapes(specs, plan.pages, limits.page_size, model.dtype),
        shape,
        frozenset(model.source.eos_token_ids),
        open_store(config.compile_cache, (model.config, shape, plan.pages, model.dtype.name)),
        progress,
    )
    info = EngineInfo(
        model=config.model,
        kind="generate",
        vocab_size=model.config.vocab_size,
        max_model_len=window,
        eos_token_ids=model.source.eos_token_ids,
        dtype=model.dtype.name,
        device=jax.devices()[0].device_kind,
        page_size=limits.page_size,
        backends=backends,
    )
    scheduler = Scheduler(cache, limits.max_num_seqs, limits.step_tokens)
    return Engine(info, scheduler, runner, max_waiting=config.max_waiting, seed=config.seed)


def _make_embedder(config: EngineConfig, model: _Model, head: Head, progress: bool) -> EmbeddingEngine:
    gpu = jax.default_backend() == "gpu"
    window, longest = window_of(config, model.config.max_position_embeddings), model.source.sentence.max_seq_length
    if config.max_model_len is None and longest:
        window = min(window, longest)
    largest = embedding_tokens(config, window, gpu=gpu)
    # Segments tell a pair's texts apart; a single text has one, so embeddings are computed without.
    token_types = getattr(model.config, "type_vocab_size", 0) if head.task == "classify" else 0
    runner = EmbeddingRunner(
        model.module,
        model.config,
        model.params,
        head,
        token_types=token_types > 1,
        budget=config.max_num_batched_tokens,
        buckets=embedding_buckets(largest, config.max_num_seqs or max(8, largest // 8), window, gpu=gpu),
        backend=config.attention_backend,
        store=open_store(config.compile_cache, (model.config, head, config.attention_backend, model.dtype.name)),
        progress=progress,
    )
    size = head.size(model.config.hidden_size)
    info = EngineInfo(
        model=config.model,
        kind=head.task,
        vocab_size=model.config.vocab_size,
        max_model_len=window,
        embedding_size=size if head.task == "embed" else 0,
        labels=head.labels,
        activation=head.activation if head.task == "classify" else "",
        token_types=token_types if token_types > 1 else 0,
        dtype=model.dtype.name,
        device=jax.devices()[0].device_kind,
    )
    return EmbeddingEngine(info, runner, max_waiting=config.max_waiting, max_wait=config.max_wait_ms / 1e3)


def _check_backends(
    config: EngineConfig, model: _Model, specs: tuple[CacheSpec, ...], page_size: int
) -> tuple[tuple[str, str, str], ...]:
    rows = describe_backends(
        model.config.num_heads,
        specs[0].kv_heads,
        specs[0].head_dim,
        page_size,
        model.dtype.name,
        backend=config.attention_backend,
        window=specs[0].window,
    )
    for op, backend, why in rows:
        logger.info("%s: %s%s", op, backend, f" ({why})" if why else "")
    return tuple(rows)


def _plan(
    config: EngineConfig, model: _Model, specs: tuple[CacheSpec, ...], shape: RunnerShape, limits: Limits
) -> MemoryPlan:
    sizes = page_bytes(specs, shape.page_size, model.dtype)
    weights = sum(x.nbytes for x in jax.tree.leaves(model.params))
    state = jax.eval_shape(lambda: init_state(shape.slots, shape.vocab_size))
    tables = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    if config.num_pages is not None:
        pages = (config.num_pages,) * shape.groups
        return MemoryPlan(0, weights, 0, tables, pages, sum(config.num_pages * size for size in sizes))
    # A window that was asked for must fit; the model's own is lowered to what does, but not below one step.
    window = limits.window if config.max_model_len else min(limits.window, limits.step_tokens)
    stats = jax.devices()[0].memory_stats()
    if stats is None:  # a CPU: its memory is the system's
        budget, temporaries = config.cpu_kv_bytes + weights + tables, 0
    else:
        temporaries = _temporaries(model, specs, shape) + RESERVE
        # What is in use already counts: weights, and whatever else the program holds.
        budget = stats["bytes_limit"] - (stats["bytes_in_use"] - weights)
    return plan_memory(
        budget=budget,
        weights=weights,
        temporaries=temporaries,
        tables=tables,
        page_bytes=sizes,
        windows=list(dict.fromkeys(spec.window for spec in specs)),
        page_size=shape.page_size,
        max_num_seqs=shape.slots,
        step_tokens=limits.step_tokens,
        sequence_tokens=window,
    )


def _temporaries(model: _Model, specs: tuple[CacheSpec, ...], shape: RunnerShape) -> int:
    """Bytes the largest step needs beside its arguments: read off its executable, compiled with few pages."""
    bucket: Bucket = max(shape.buckets, key=lambda b: b.tokens)
    cache = cache_shapes(specs, (2 * shape.max_pages,) * shape.groups, shape.page_size, model.dtype)
    layout = forward_layout(bucket, shape.groups, shape.page_size)
    tables = jax.eval_shape(lambda: init_tables(shape.groups, shape.slots, shape.max_pages))
    tail = jax.eval_shape(lambda: init_state(shape.slots, shape.vocab_size)).tail
    forward = forward_function(model.module, model.config, shape)
    analysis = forward.lower(model.params, cache, tables, tail, layout.abstract, bucket).compile().memory_analysis()
    aliased = analysis.alias_size_in_bytes
    # Two steps overlap: the outputs of one are alive while the next runs.
    return analysis.temp_size_in_bytes + 2 * max(0, analysis.output_size_in_bytes - aliased)
