"""The one Triton attention kernel, for decode, ragged prefill and packed batches, on any NVIDIA GPU from Ampere on.

FlashAttention-2's schedule (Dao 2023, arXiv:2307.08691). The query heads that share a KV head stand in one tile,
so that each block of K and V is read once for all of them; rows of one query are cut along K and V and combined after.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from pjengine.pallas_kernels.backends import Target
from pjengine.pallas_kernels.specs import AttentionSpec
from pjengine.pallas_kernels.tuning import tuned

LOG2E = tl.constexpr(math.log2(math.e))
MOST_SPLITS = 32
SPLIT_TOKENS = 256  # a split of fewer tokens costs more to combine than it saves
ASSUMED_SMS = 108  # of an A100; where the device does not say


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """queries: rows of a query tile (tokens times heads of a group); keys: KV tokens of a block."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What one program computes: int32 arrays; row -1: nothing.

    Attributes:
      rows, offsets: [items], the row of an item and its first query in that row.
      starts, counts, lens: [R], a row's first query token, its queries, its KV tokens.
      tables: [R, max_pages], or [1, 1] where there is no cache: KV token i of a row is then token starts + i.
    """

    rows: jax.Array
    offsets: jax.Array
    starts: jax.Array
    counts: jax.Array
    lens: jax.Array
    tables: jax.Array


def tile_config(spec: AttentionSpec, target: Target, *, single: bool) -> TileConfig:
    """The device's tuned tiles, or ones that an sm89's shared memory (99 KiB) holds by their sizes."""
    wide, float32 = spec.head_dim > 128, spec.dtype == "float32"
    keys = 64 >> (wide + float32)
    if single:
        heuristic = TileConfig(max(16, triton.next_power_of_2(spec.group)), keys, 4, 2)
        return tuned("triton decode", spec, target, heuristic)
    heuristic = TileConfig(128 >> (wide + float32), keys, 4 if spec.head_dim <= 64 else 8, 2)
    return tuned("triton prefill" if spec.page_size else "triton packed", spec, target, heuristic)


def queries_per_item(spec: AttentionSpec, config: TileConfig) -> int:
    return config.queries // spec.group


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    work: Work,
    sinks: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    relative_bias: jax.Array | None = None,
    *,
    spec: AttentionSpec,
    scale: float,
    config: TileConfig,
    target: Target,
) -> jax.Array:
    """Attention of the items' queries: [T, heads, head_dim], zeros where no item has a query."""
    constants = _constants(spec, scale, config, work.tables.shape[1], splits=1)
    constants["REACH"] = relative_bias.shape[1] // 2 if relative_bias is not None else 0
    grid = (work.rows.shape[0], spec.kv_heads, 1)
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((1,), jnp.float32)]
    inputs = _inputs(q, k, v, work, sinks, k_scale, v_scale, spec, relative_bias)
    return _call(inputs, shapes, grid, config, constants, target)[0]


def attend_single(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    work: Work,
    sinks: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    *,
    spec: AttentionSpec,
    scale: float,
    config: TileConfig,
    target: Target,
) -> jax.Array:
    """Attention of items of one query each, cut along K and V: [items, heads, head_dim] in q's dtype."""
    items, (kv_heads, group, head_dim) = work.rows.shape[0], (spec.kv_heads, spec.group, spec.head_dim)
    longest = work.tables.shape[1] * (spec.page_size or 1)
    splits = split_count(items * kv_heads, longest, target.cores or ASSUMED_SMS)
    constants = _constants(spec, scale, config, work.tables.shape[1], splits=splits)
    partial = (items, kv_heads, splits, group)
    shapes = [jax.ShapeDtypeStruct((*partial, head_dim), jnp.float32), jax.ShapeDtypeStruct(partial, jnp.float32)]
    inputs = _inputs(q, k, v, work, sinks, k_scale, v_scale, spec)
    out, log_sum = _call(inputs, shapes, (items, kv_heads, splits), config, constants, target)
    weights = jnp.exp2(log_sum - log_sum.max(axis=2, keepdims=True))
    out = (out * weights[..., None]).sum(axis=2) / weights.sum(axis=2)[..., None]
    return out.reshape(items, spec.heads, head_dim).astype(q.dtype)


def split_count(programs: int, longest: int, sms: int) -> int:
    """Pieces of each row, a power of two: two programs for each SM, none shorter than SPLIT_TOKENS."""
    wanted = max(1, min(2 * sms // programs, longest // SPLIT_TOKENS, MOST_SPLITS))
    return 1 << (wanted.bit_length() - 1)


def _inputs(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    work: Work,
    sinks: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    spec: AttentionSpec,
    relative_bias: jax.Array | None = None,
) -> list[jax.Array]:
    def per_head(scale: jax.Array | None) -> jax.Array:
        return jnp.broadcast_to(jnp.float32(1) if scale is None else scale.astype(jnp.float32), (spec.kv_heads,))

    logits = jnp.zeros(1, jnp.float32) if sinks is None else sinks.astype(jnp.float32) * LOG2E.value
    indices = (work.rows, work.offsets, work.starts, work.counts, work.lens, work.tables)
    biases = jnp.zeros(1, jnp.float32) if relative_bias is None else relative_bias.astype(jnp.float32)
    return [q, k, v, *(x.astype(jnp.int32) for x in indices), logits, per_head(k_scale), per_head(v_scale), biases]


def _constants(spec: AttentionSpec, scale: float, config: TileConfig, max_pages: int, splits: int) -> dict[str, Any]:
    return {
        "HEADS": spec.heads,
        "KV_HEADS": spec.kv_heads,
        "GROUP": spec.group,
        "DIM": spec.head_dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(spec.head_dim)),
        "BLOCK_M": config.queries,
        "BLOCK_N": config.keys,
        "PAGE": spec.page_size or 0,
        "MAX_PAGES": max_pages,
        "SPLITS": splits,
        "SINGLE": splits > 0 and spec.decode,
        "SCALE": float(scale),
        "CAUSAL": spec.causal,
        "WINDOW": spec.window or 0,
        "CHUNK": spec.chunk or 0,
        "SOFT_CAP": float(spec.soft_cap or 0),
        "SINKS": spec.sinks,
        "REACH": 0,
    }


def _call(
    inputs: list[jax.Array],
    shapes: list[jax.ShapeDtypeStruct],
    grid: tuple[int, int, int],
    config: TileConfig,
    constants: dict[str, Any],
    target: Target,
) -> Any:
    known = inspect.signature(jax_triton.triton_call).parameters
    options: dict[str, Any] = {"out_type" if "out_type" in known else "out_shape": shapes}
    if "compute_capability" in known:
        options["compute_capability"] = target.compute_capability
    return jax_triton.triton_call(
        *inputs,
        kernel=attention_kernel,
        grid=grid,
        num_warps=config.warps,
        num_stages=config.stages,
        zeroed_outputs=() if constants["SINGLE"] else (0,),
        **options,
        **constants,
    )


@triton.jit
def attention_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    item_rows,
    item_offsets,
    starts,
    counts,
    lens,
    tables,
    sinks,
    k_scales,
    v_scales,
    biases,
    out,
    log_sums,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    SINGLE: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr,
    REACH: tl.constexpr,
):
    """One item, one KV head, one split: see Work, and the masks of `masking.visible`. Scores are in units of log2."""
    item, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(item_rows + item)
    if row < 0:
        return
    offset = tl.load(item_offsets + item)
    start = tl.load(starts + row).to(tl.int64)
    count = tl.load(counts + row)
    length = tl.load(lens + row)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DIM)
    block_queries: tl.constexpr = BLOCK_M // GROUP
    query = offset + m // GROUP
    head = kv_head * GROUP + m % GROUP
    real = (query < count) & (m < block_queries * GROUP)
    position = length - count + query
    index = ((start + query) * HEADS + head)[:, None] * DIM + d[None, :]
    within = real[:, None] & (d < DIM)[None, :]
    queries = tl.load(q + index, mask=within, other=0.0)

    lowest = length - count + offset
    highest = length - count + tl.minimum(offset + block_queries, count) - 1
    first = 0
    last = length
    if CAUSAL:
        last = tl.minimum(last, highest + 1)
    if WINDOW:
        first = tl.maximum(first, lowest - WINDOW + 1)
        if not CAUSAL:
            last = tl.minimum(last, highest + WINDOW)
    if CHUNK:
        first = tl.maximum(first, lowest // CHUNK * CHUNK)
    first = first // BLOCK_N * BLOCK_N
    if SPLITS > 1:
        piece = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), BLOCK_N), SPLITS) * BLOCK_N
        first += split * piece
        last = tl.minimum(last, first + piece)

    scale = SCALE * tl.load(k_scales + kv_head)
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:  # noqa: SIM102 (decided at compile time, the inner one at run time)
        if split == 0:
            top = tl.load(sinks + head, mask=head < HEADS, other=0)
            total += 1
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for begin in range(first, last, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        exists = key < length
        if PAGE:
            page = tl.load(tables + row * MAX_PAGES + key // PAGE, mask=exists, other=0).to(tl.int64)
            token = (page * KV_HEADS + kv_head) * PAGE + key % PAGE
        else:
            token = (start + key) * KV_HEADS + kv_head
        keys = tl.load(k + token[None, :] * DIM + d[:, None], mask=exists[None, :] & (d < DIM)[:, None], other=0.0).to(
            queries.dtype
        )
        scores = tl.dot(queries, keys, input_precision="ieee") * scale
        if SOFT_CAP > 0:
            # tanh(x) = 2 sigmoid(2 x) - 1
            scores = SOFT_CAP * (2 * tl.sigmoid(scores * (2 / SOFT_CAP)) - 1)
        if REACH:
            away = tl.minimum(tl.maximum(key[None, :] - position[:, None], -REACH), REACH)
            scores += tl.load(biases + head[:, None] * (2 * REACH + 1) + REACH + away)
        seen = exists[None, :] & real[:, None]
        if CAUSAL:
            seen &= key[None, :] <= position[:, None]
        if WINDOW:
            seen &= key[None, :] > position[:, None] - WINDOW
            if not CAUSAL:
                seen &= key[None, :] < position[:, None] + WINDOW
        if CHUNK:
            seen &= key[None, :] // CHUNK == position[:, None] // CHUNK
        scores = tl.where(seen, scores * LOG2E, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp2(scores - new_top[:, None]), 0)
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weights, 1)
        values = tl.load(
            v + token[:, None] * DIM + d[None, :], mask=exists[:, None] & (d < DIM)[None, :], other=0.0
        ).to(queries.dtype)
        acc = acc * rescale[:, None] + tl.dot(weights.to(queries.dtype), values, input_precision="ieee")
        top = new_top

    acc = acc * (tl.load(v_scales + kv_head) / tl.where(total == 0, 1, total))[:, None]
    if SINGLE:
        partial = ((item * KV_HEADS + kv_head).to(tl.int64) * SPLITS + split) * GROUP + m
        tl.store(out + partial[:, None] * DIM + d[None, :], acc, mask=(m < GROUP)[:, None] & (d < DIM)[None, :])
        # Nothing seen: a weight of zero beside any split that saw something.
        tl.store(log_sums + partial, tl.where(total == 0, -1e30, top + tl.log2(total)), mask=m < GROUP)
    else:
        tl.store(out + index, acc.to(queries.dtype), mask=within)
