"""What a model would have of a GPU's memory, worked out on a machine that has none: `pjengine plan`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pjengine.batch import init_tables
from pjengine.config import EngineConfig
from pjengine.device_cache import page_bytes
from pjengine.errors import ConfigError, OutOfMemory
from pjengine.kv_cache import CacheGroup, KVCacheManager
from pjengine.limits import Limits, embedding_tokens, embedding_window, limits_of
from pjengine.memory_plan import GIB, RESERVE, MemoryPlan, device_budget, plan_memory, step_temporaries
from pjengine.models.loading import choose_dtype, model_of, weight_specs
from pjengine.models.params import ParamSpec, is_spec
from pjengine.models.sources import resolve
from pjengine.models.tasks import head_of
from pjengine.sampler import init_state
from pjengine.step_inputs import CacheSpec

# GiB that CUDA reports as a card's whole memory; drivers differ by about one percent.
DEVICES: Mapping[str, float] = {
    "b200": 178.3,
    "h200": 139.8,
    "h100": 79.1,
    "a100": 79.1,
    "a100-40gb": 39.4,
    "l40s": 44.4,
    "l4": 22.0,
    "a10g": 22.0,
    "rtx-4090": 23.6,
}
_SHARDED = ("vocab", "heads", "mlp", "qkv", "gate_up")  # logical axes that tensor parallelism divides
_LENGTHS = (512, 2048, 8192, 32768, 131072)


@dataclasses.dataclass(frozen=True)
class DevicePlan:
    """A model on one device, or on one of `tensor_parallel` equal ones.

    Attributes:
      memory: bytes of each use. For an embedder the pages are none.
      dtype: of weights and cache.
      limits: of the engine; None for an embedder.
      kv_bytes_per_token: over all layers.
      kv_tokens: tokens that the cache holds.
      longest: the longest sequence that fits and the model allows, tokens.
      concurrent: sequence length in tokens -> sequences of it that the cache holds at once.
    """

    memory: MemoryPlan
    dtype: str
    limits: Limits | None = None
    kv_bytes_per_token: int = 0
    kv_tokens: int = 0
    longest: int = 0
    concurrent: dict[int, int] = dataclasses.field(default_factory=dict)


def plan_device(config: EngineConfig, memory: float, tensor_parallel: int = 1) -> DevicePlan:
    """The engine's memory plan for a GPU, from the model's config alone; no device is touched, no weight is read.

    All is exact but the temporaries, which the engine reads off its executables and which are estimated here.

    Args:
      memory: of the device, GiB.
      tensor_parallel: devices that share the model.
    Raises:
      ModelError, ConfigError: as `make_engine`; also where the model cannot be divided.
      OutOfMemory: it does not fit; the message holds the numbers.
    """
    if not 0 < memory < math.inf:
        raise ConfigError(f"device_memory: expected GiB above 0, got {memory}")
    source = resolve(config.model, "dummy")
    module, model = model_of(source)
    dtype = choose_dtype(source, config.dtype, platform="gpu")
    shards = Shards(tensor_parallel, model)
    head = head_of(source, module, model, config.task)
    leaves = jax.tree.leaves(weight_specs(module, model, head), is_leaf=is_spec)
    weights = sum(shards.weight_bytes(spec, dtype) for spec in leaves)
    budget = device_budget(int(memory * GIB), config.gpu_memory_utilization)
    if head is not None:
        return _embedder_plan(config, source.sentence.max_seq_length, model, dtype, shards, budget, weights)
    return _decoder_plan(config, module, model, dtype, shards, budget, weights)


@dataclasses.dataclass(frozen=True)
class Shards:
    """How `count` devices share a model: each has its part of the heads, of the MLP and of the vocabulary.

    Raises: ConfigError if the heads or the MLP cannot be divided.
    """

    count: int
    model: Any

    def __post_init__(self) -> None:
        n, heads, kv = self.count, self.model.num_heads, self.kv_heads(1)
        for name, size in (("num_heads", heads), ("mlp_size", self.model.mlp_size)):
            if size % n:
                raise ConfigError(f"tensor_parallel: {n} does not divide the model's {name}, {size}")
        if kv % n and n % kv:
            raise ConfigError(f"tensor_parallel: {n} neither divides the model's {kv} KV heads nor is a multiple")

    def kv_heads(self, count: int) -> int:
        """KV heads of each of `count` devices; one at least: with more devices than heads, some hold the same."""
        return -(-getattr(self.model, "num_kv_heads", self.model.num_heads) // count)

    def size(self, axis: str | None, size: int) -> int:
        """Of a dimension of `size` elements, what one device holds."""
        if axis not in _SHARDED:
            return size
        if axis == "qkv":
            head_dim = size // (self.model.num_heads + 2 * self.kv_heads(1))
            return (self.model.num_heads // self.count + 2 * self.kv_heads(self.count)) * head_dim
        return -(-size // self.count)

    def weight_bytes(self, spec: ParamSpec, dtype: Any) -> int:
        shape = [self.size(axis, size) for axis, size in zip(spec.axes, spec.shape, strict=True)]
        return math.prod(shape) * jnp.dtype(spec.dtype or dtype).itemsize


def _decoder_plan(
    config: EngineConfig, module: ModuleType, model: Any, dtype: Any, shards: Shards, budget: int, weights: int
) -> DevicePlan:
    limits = limits_of(config, model.max_position_embeddings, gpu=True)
    specs = [dataclasses.replace(s, kv_heads=shards.kv_heads(shards.count)) for s in module.cache_specs(model)]
    windows = list(dict.fromkeys(spec.window for spec in specs))
    sizes = page_bytes(specs, limits.page_size, dtype)
    memory = decoder_memory(config, specs, model, dtype, limits, budget, weights, shards=shards)
    if config.num_pages is not None and memory.total > budget:
        raise OutOfMemory(f"num_pages: {config.num_pages} pages do not fit ({memory}); ask for fewer")
    groups = [CacheGroup(pages, window) for pages, window in zip(memory.pages, windows, strict=True)]
    longest = min(limits.window, KVCacheManager(groups, limits.page_size, False).capacity(limits.step_tokens))
    deciding = [g for g in groups if g.window is None] or groups
    lengths = [*(n for n in _LENGTHS if n < longest), longest]
    return DevicePlan(
        memory,
        dtype.name,
        limits,
        kv_bytes_per_token=sum(sizes) // limits.page_size,
        kv_tokens=min(g.num_pages - 1 for g in deciding) * limits.page_size,
        longest=longest,
        concurrent={n: _concurrent(n, groups, limits.page_size) for n in lengths},
    )


def decoder_memory(
    config: EngineConfig,
    specs: Sequence[CacheSpec],
    model: Any,
    dtype: Any,
    limits: Limits,
    budget: int,
    weights: int,
    *,
    shards: Shards,
    temporaries: int | None = None,
) -> MemoryPlan:
    """The plan of a generating engine, on a device or without one.

    Args:
      budget, weights: bytes.
      temporaries: bytes; None: estimated for a GPU.
    Raises:
      OutOfMemory: it does not fit; the message holds the numbers.
    """
    sizes = page_bytes(specs, limits.page_size, dtype)
    tables = table_bytes(limits, specs, model.vocab_size)
    if temporaries is None:
        temporaries = step_temporaries(
            tokens=limits.step_tokens,
            rows=min(limits.step_tokens, limits.max_num_seqs),
            widths=activation_width(model, shards),
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size,
            itemsize=jnp.dtype(dtype).itemsize,
        )
    if config.num_pages is not None:
        taken = config.num_pages * sum(sizes)
        return MemoryPlan(budget, weights, temporaries, tables, (config.num_pages,) * len(sizes), taken)
    return plan_memory(
        budget=budget,
        weights=weights,
        temporaries=temporaries,
        tables=tables,
        page_bytes=sizes,
        windows=list(dict.fromkeys(spec.window for spec in specs)),
        page_size=limits.page_size,
        max_num_seqs=limits.max_num_seqs,
        step_tokens=limits.step_tokens,
        # A window that was asked for must fit; the model's own is lowered to what does, but not below one step.
        sequence_tokens=limits.window if config.max_model_len else min(limits.window, limits.step_tokens),
    )


def table_bytes(limits: Limits, specs: Sequence[CacheSpec], vocab_size: int) -> int:
    """Bytes of the slots' tables on the device: the sampler's and the block tables."""
    groups, pages = len({spec.window for spec in specs}), -(-limits.window // limits.page_size)

    def tables() -> Any:
        return init_state(limits.max_num_seqs, vocab_size), init_tables(groups, limits.max_num_seqs, pages)

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tables)))


def _embedder_plan(
    config: EngineConfig, sentence_limit: int | None, model: Any, dtype: Any, shards: Shards, budget: int, weights: int
) -> DevicePlan:
    window = embedding_window(config, model.max_position_embeddings, sentence_limit)
    tokens = embedding_tokens(config, window, gpu=True)
    activations = tokens * activation_width(model, shards) * jnp.dtype(dtype).itemsize
    memory = MemoryPlan(budget, weights, activations + RESERVE, 0, (), 0)
    if memory.weights + memory.temporaries > budget:
        raise OutOfMemory(f"model: it does not fit ({memory}); lower max_num_batched_tokens, or take a larger device")
    return DevicePlan(memory, dtype.name, longest=window)


def activation_width(model: Any, shards: Shards) -> int:
    """Elements per token alive at once in a layer, roughly: the residual stream and its norm, and the larger of
    attention (QKV and output) and MLP (gate, up and their product; for an encoder one fewer, which is neglected).
    """
    attention = 2 * shards.size("qkv", (model.num_heads + 2 * shards.kv_heads(1)) * _head_dim(model))
    mlp = 3 * shards.size("mlp", model.mlp_size)
    return 2 * model.hidden_size + max(attention, mlp)


def _head_dim(model: Any) -> int:
    return getattr(model, "head_dim", model.hidden_size // model.num_heads)


def _concurrent(length: int, groups: list[CacheGroup], page_size: int) -> int:
    """Sequences of a length that fit at once; with a window each holds that and a page cut at either end."""
    held = [length if g.window is None else min(length, g.window + 2 * page_size) for g in groups]
    return min((g.num_pages - 1) // -(-tokens // page_size) for g, tokens in zip(groups, held, strict=True))
