"""From options to a running engine: `make_engine(EngineConfig) -> Engine | EmbeddingEngine`."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
import weakref
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pjengine.batch import Bucket
from pjengine.compilation import Compilation
from pjengine.config import EngineConfig
from pjengine.cuda_driver import total_memory
from pjengine.device_cache import cache_shapes
from pjengine.device_plan import Shards, decoder_memory, table_bytes
from pjengine.embedding_engine import EmbeddingEngine
from pjengine.embedding_runner import EmbeddingRunner, embedding_buckets
from pjengine.engine import Engine
from pjengine.engine_info import EngineInfo
from pjengine.errors import KernelUnavailable, OutOfMemory
from pjengine.executables import ExecutableStore, open_store, use_compile_cache
from pjengine.kv_cache import CacheGroup, KVCacheManager
from pjengine.limits import Limits, embedding_tokens, embedding_window, limits_of
from pjengine.memory_plan import GIB, RESERVE, MemoryPlan, device_budget
from pjengine.model_runner import ModelRunner
from pjengine.models.decoder import DecoderConfig
from pjengine.models.encoder import EncoderConfig
from pjengine.models.glu_encoder import GLUEncoderConfig
from pjengine.models.heads import Head
from pjengine.models.loading import choose_dtype, load_source, model_of, weight_specs
from pjengine.models.modernbert import Config as ModernBertConfig
from pjengine.models.params import is_spec
from pjengine.models.revision import revision
from pjengine.models.rope import Rope
from pjengine.models.sources import Source, resolve
from pjengine.models.tasks import head_of
from pjengine.pallas_kernels import describe_backends, describe_embedder_backends
from pjengine.pallas_kernels.specs import AttentionSpec, GatedSpec, QKVSpec, RotationSpec
from pjengine.phases import PhaseLog
from pjengine.scheduler import Scheduler
from pjengine.step_inputs import CacheSpec
from pjengine.step_programs import RunnerShape, StepPrograms, cpu_buckets, gpu_buckets

logger = logging.getLogger(__name__)

_LATE_THREADS = max(1, (os.cpu_count() or 1) // 4)  # that compile while the engine serves


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model, and where it comes from."""

    source: Source
    module: ModuleType
    config: Any
    dtype: jnp.dtype
    head: Head | None

    @property
    def specs(self) -> Any:
        """Of its weights: a tree of `jax.ShapeDtypeStruct`."""
        specs = weight_specs(self.module, self.config, self.head)
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype or self.dtype), specs, is_leaf=is_spec)

    @property
    def weight_bytes(self) -> int:
        return sum(spec.size * spec.dtype.itemsize for spec in jax.tree.leaves(self.specs))

    def load(self, seed: int) -> Any:
        """Its weights on the device."""
        started = time.monotonic()
        params = load_source(self.source, self.module, self.config, self.dtype, head=self.head, seed=seed)
        jax.block_until_ready(params)
        seconds = time.monotonic() - started
        # A record's attribute `phase` names what has ended, for those who time the start-up.
        logger.info("loaded weights as %s in %.1f s", self.dtype, seconds, extra={"phase": "weights"})
        return params


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
    started, phases = time.monotonic(), PhaseLog()
    with phases.attached():
        prepare_device(config)
        model = _find_model(config)
        if model.head is None:
            engine: Engine | EmbeddingEngine = _make_generator(config, model, progress)
        else:
            engine = _make_embedder(config, model, model.head, progress)
    phases.mark("cache and tables")
    info, seconds = engine.info, time.monotonic() - started
    parts = ", ".join(f"{phase} {took:.1f}" for phase, took in phases.seconds(started).items())
    logger.info(
        "ready in %.1f s (%s): %s to %s, %s on %s, up to %d tokens", seconds, parts, info.model, info.kind, info.dtype,
        info.device, info.max_model_len, extra={"phase": "cache and tables"},
    )  # fmt: skip
    return engine


def generates(config: EngineConfig) -> bool:
    """Whether the model would generate; reads its configuration alone. Raises: ModelError as `make_engine`."""
    return _find_model(config).head is None


def _find_model(config: EngineConfig) -> _Model:
    source = resolve(config.model, config.load_format)
    module, model_config = model_of(source)
    dtype = choose_dtype(source, config.dtype)
    return _Model(source, module, model_config, dtype, head_of(source, module, model_config, config.task))


def prepare_device(config: EngineConfig) -> None:
    """Settings that JAX reads when it first touches the device; a program that has done so already keeps its own."""
    if (memory := total_memory()) is not None:
        share = device_budget(memory, config.gpu_memory_utilization) / memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{share:.5f}")
    use_compile_cache(config.compile_cache)


def _make_generator(config: EngineConfig, model: _Model, progress: bool) -> Engine:
    gpu = jax.default_backend() == "gpu"
    specs = model.module.cache_specs(model.config)
    limits = limits_of(config, model.config.max_position_embeddings, gpu=gpu)
    backends = _check_backends(config, model, specs, limits.page_size)
    runner, plan = _make_runner(config, model, specs, limits, progress)
    windows = dict.fromkeys(spec.window for spec in specs)
    groups = [CacheGroup(pages, w) for pages, w in zip(plan.pages, windows, strict=True)]
    cache = KVCacheManager(groups, limits.page_size, config.enable_prefix_caching)
    window = min(limits.window, cache.capacity(limits.step_tokens))
    if window < limits.window:
        logger.warning("max_model_len: lowered to %d, the longest sequence that %d pages hold", window, min(plan.pages))
    info = EngineInfo(
        model=config.model,
        kind="generate",
        vocab_size=model.config.vocab_size,
        max_model_len=window,
        eos_token_ids=model.source.eos_token_ids,
        dtype=model.dtype.name,
        device=jax.devices()[0].device_kind,
        page_size=limits.page_size,
        max_num_seqs=limits.max_num_seqs,
        backends=backends,
    )
    scheduler = Scheduler(cache, limits.max_num_seqs, runner.step_tokens, runner.programs.shape.step_sizes)
    return Engine(info, scheduler, runner, max_waiting=config.max_waiting, seed=config.seed)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The programs of a plan, on their way."""

    programs: StepPrograms
    executables: Compilation
    store: ExecutableStore

    def compile_late(self) -> Compilation:
        late = Compilation(self.programs.late_works(), self.store, progress=False, threads=_LATE_THREADS)
        late.begin()
        return late

    def wait(self, buckets: int | None) -> int:
        """Until the first buckets (None: all) are ready. Returns: bytes that a step in one of them needs at most."""
        keys = [work.key for work in self.programs.all_works(buckets)]
        self.executables.begin(keys)
        self.executables.wait(keys)
        ready = [key for key in keys if isinstance(key, Bucket)]
        return max(self.programs.needed(bucket, self.executables) for bucket in ready)


def _start_steps(
    config: EngineConfig, model: _Model, specs: tuple[CacheSpec, ...], limits: Limits, plan: MemoryPlan, progress: bool
) -> _Steps:
    gpu = jax.default_backend() == "gpu"
    shape = RunnerShape(
        buckets=(gpu_buckets if gpu else cpu_buckets)(limits.max_num_seqs, limits.step_tokens),
        slots=limits.max_num_seqs,
        max_pages=-(-limits.window // limits.page_size),
        page_size=limits.page_size,
        groups=len(plan.pages),
        vocab_size=model.config.vocab_size,
        backend=config.attention_backend,
    )
    pages = cache_shapes(specs, plan.pages, limits.page_size, model.dtype)
    programs = StepPrograms(model.module, model.config, model.specs, pages, shape)
    store = open_store(config.compile_cache, (model.config, shape, plan.pages, model.dtype.name))
    works = [*programs.all_works(config.eager_buckets), *programs.all_works()]
    return _Steps(programs, Compilation(works, store, progress), store)


def _make_runner(
    config: EngineConfig, model: _Model, specs: tuple[CacheSpec, ...], limits: Limits, progress: bool
) -> tuple[ModelRunner, MemoryPlan]:
    """Weights, then executables, then the cache: each finds the device's memory as it expects it."""
    budget = _budget(config, model, specs, limits)
    plan = _plan(config, model, specs, limits, budget)
    logger.info("memory: %s", plan, extra={"phase": "memory plan"})
    steps = _start_steps(config, model, specs, limits, plan, progress)
    try:
        params = model.load(config.seed)
        needed = steps.wait(config.eager_buckets)
        gpu = plan.temporaries > 0
        if gpu and needed > plan.temporaries - RESERVE:
            again = _plan(config, model, specs, limits, budget, needed + RESERVE)
            logger.warning("a step needs %.2f GiB, more than was estimated; memory: %s", needed / GIB, again)
            if again.pages != plan.pages:
                steps.executables.cancel()
                steps = _start_steps(config, model, specs, limits, again, progress)
                steps.wait(config.eager_buckets)
            plan = again
        room = plan.temporaries - RESERVE if gpu else None
        eos = frozenset(model.source.eos_token_ids)
        runner = ModelRunner(steps.programs, steps.executables, steps.compile_late, steps.store, params, eos, room)
        logger.info("executables are ready", extra={"phase": "executables"})
        steps.executables.begin()
        weakref.finalize(runner, steps.executables.cancel)
        if gpu:  # a CPU has no cores to spare
            runner.compile_late()
    except BaseException as error:
        steps.executables.cancel()
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemory(
                f"gpu_memory_utilization: the device has less free memory than was planned with ({plan}); end what "
                "else runs on it, or set a smaller share"
            ) from error
        raise
    return runner, plan


def _make_embedder(config: EngineConfig, model: _Model, head: Head, progress: bool) -> EmbeddingEngine:
    gpu = jax.default_backend() == "gpu"
    window = embedding_window(config, model.config.max_position_embeddings, model.source.sentence.max_seq_length)
    largest = embedding_tokens(config, window, gpu=gpu)
    # Segments tell a pair's texts apart; a single text has one, so embeddings are computed without.
    token_types = getattr(model.config, "type_vocab_size", 0) if head.task == "classify" else 0
    backends = _embedder_backends(config, model)
    runner = EmbeddingRunner(
        model.module,
        model.config,
        model.load(config.seed),
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
        backends=backends,
        revision=revision(model.source),
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
        gated=_gated(model),
        qkv=_qkv(model, specs[0].kv_heads, specs[0].head_dim, model.dtype.name),
    )
    return _logged(rows, ("paged_attention", "rope_write_kv"), config.attention_backend)


def _embedder_backends(config: EngineConfig, model: _Model) -> tuple[tuple[str, str, str], ...]:
    shape, dtype = model.config, model.dtype.name
    specs = model.module.cache_specs(shape)  # a decoder's; encoders have none
    kv_heads, head_dim = shape.num_heads, shape.hidden_size // shape.num_heads
    if specs:
        kv_heads, head_dim = specs[0].kv_heads, specs[0].head_dim
    rotates = any(isinstance(getattr(shape, field.name), Rope) for field in dataclasses.fields(shape))
    rows = describe_embedder_backends(
        AttentionSpec(shape.num_heads, kv_heads, head_dim, dtype, dtype, causal=bool(specs)),
        backend=config.attention_backend,
        rotation=RotationSpec(shape.num_heads, kv_heads, head_dim, dtype) if rotates else None,
        gated=_gated(model),
        qkv=_qkv(model, kv_heads, head_dim) if rotates else None,
        stack=shape.stack_spec(dtype) if isinstance(shape, EncoderConfig) else None,
    )
    return _logged(rows, ("packed_attention", "rope_qkv"), config.attention_backend)


def _logged(rows: list[tuple[str, str, str]], needed: tuple[str, ...], asked: str) -> tuple[tuple[str, str, str], ...]:
    """Rows of (op, backend, why), written to the log. Raises: KernelUnavailable if nothing serves an op of `needed`."""
    for op, backend, why in rows:
        logger.info("%s: %s%s", op, backend, f" ({why})" if why else "")
        if backend == "none" and op.startswith(needed):
            raise KernelUnavailable(
                f"attention_backend: {asked!r} cannot serve {op} of this model here ({why}); take another, or auto"
            )
    return tuple(rows)


def _gated(model: _Model) -> GatedSpec | None:
    """The MLP of the models whose layers ask for `gated_product`."""
    config = model.config
    if not isinstance(config, DecoderConfig) or config.mlp_bias:
        return None
    return GatedSpec(config.hidden_size, config.mlp_size, model.dtype.name)


def _qkv(model: _Model, kv_heads: int, head_dim: int, kv_dtype: str | None = None) -> QKVSpec | None:
    """The projection of the models whose layers ask for `qkv_product`."""
    config = model.config
    if not isinstance(config, DecoderConfig | GLUEncoderConfig | ModernBertConfig):
        return None
    return QKVSpec(config.hidden_size, config.num_heads, kv_heads, head_dim, model.dtype.name, kv_dtype)


def _budget(config: EngineConfig, model: _Model, specs: tuple[CacheSpec, ...], limits: Limits) -> int:
    """Bytes for weights, tables, temporaries and cache."""
    stats = jax.devices()[0].memory_stats()
    if stats is not None:  # what is in use already is lost to us
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    # A CPU: its memory is the system's.
    return config.cpu_kv_bytes + model.weight_bytes + table_bytes(limits, specs, model.config.vocab_size)


def _plan(
    config: EngineConfig,
    model: _Model,
    specs: tuple[CacheSpec, ...],
    limits: Limits,
    budget: int,
    temporaries: int | None = None,
) -> MemoryPlan:
    if jax.devices()[0].memory_stats() is None:
        temporaries = 0
    shards = Shards(1, model.config)
    weights = model.weight_bytes
    return decoder_memory(
        config, specs, model.config, model.dtype, limits, budget, weights, shards=shards, temporaries=temporaries
    )
