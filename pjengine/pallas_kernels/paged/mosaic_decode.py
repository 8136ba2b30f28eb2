"""Paged decode on Hopper: split-KV with a perfectly even split, in Pallas Mosaic GPU.

The KV blocks of all (row, KV head) pairs stand in one line, row by row and head by head. Each worker takes an equal,
contiguous piece of that line, so that ragged lengths cost nothing: a worker is busy until its piece ends, whatever rows
it crosses, and its copies run ahead across row borders. Where a pair is cut, its pieces leave partial results that a
second, small kernel combines (as in FlashDecoding; the even cut is Stream-K's, Osama et al. 2023, arXiv:2301.03598).

A worker is a pair of warpgroups: one issues the TMA copies, one computes. Two workers share an SM.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.masking import cap_scores, first_visible
from pjengine.pallas_kernels.mosaic_common import (
    LOG2E,
    MASKED,
    TILE_ROWS,
    clear_rows_from,
    column,
    launch,
    load_rows,
    store_column,
    store_rows,
    tile,
    tile_iota,
    tiled_smem,
)
from pjengine.pallas_kernels.paged.mosaic_combine import combine_kernel
from pjengine.pallas_kernels.paged.pages import GRANULE, copy_block, copy_sources
from pjengine.pallas_kernels.specs import AttentionSpec


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Tuning of the kernel.

    Attributes:
      block: KV tokens per step of a worker, a multiple of 64 and of the page size or a divisor of it.
      stages: blocks of K, and of V, in flight per worker.
      workers: per SM.
      sms: streaming multiprocessors of the device.
    """

    block: int
    stages: int
    workers: int
    sms: int


@dataclasses.dataclass(frozen=True)
class _Segment:
    """A run of KV blocks of one (row, KV head) pair inside one worker's share. All are scalars inside the kernel.

    Attributes:
      step: blocks this worker had before.
      row, head: the pair; length: the row's KV tokens.
      first, blocks: the run.
      opens: it begins where the pair begins; whole: it is all of the pair.
    """

    step: jax.Array
    row: jax.Array
    head: jax.Array
    length: jax.Array
    first: jax.Array
    blocks: jax.Array
    opens: jax.Array
    whole: jax.Array


def decode_plan(kv_lens: jax.Array, spec: AttentionSpec, config: DecodeConfig) -> tuple[jax.Array, jax.Array]:
    """What the kernels need to know about lengths; equal for all layers with one spec, so XLA computes it once a step.

    Args:
      kv_lens: int32 [R].
    Returns:
      starts: int32 [R + 1], exclusive cumulative sum of each row's blocks (of one head);
      shares: int32 [workers, 4]: begin and end of each worker's piece of the line, row and head it begins in.
    """
    ends = -(-kv_lens // config.block)
    begins = _first(kv_lens, spec) // config.block
    starts = jnp.cumsum(jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.maximum(ends - begins, 0)])).astype(jnp.int32)
    workers = config.sms * config.workers
    line = starts * spec.kv_heads
    share = -(-line[-1] // workers)
    begin = jnp.minimum(jnp.arange(workers, dtype=jnp.int32) * share, line[-1])
    row = jnp.sum(line[None, 1:] <= begin[:, None], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, kv_lens.shape[0] - 1)
    head = (begin - line[row]) // jnp.maximum(starts[row + 1] - starts[row], 1)
    return starts, jnp.stack([begin, jnp.minimum(begin + share, line[-1]), row, head], axis=1)


def _first(kv_lens: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Position of the first key that the last query of a row sees."""
    return first_visible(jnp.maximum(kv_lens - 1, 0), window=spec.window, chunk=spec.chunk)


@functools.partial(jax.jit, static_argnames=("spec", "scale", "config"))
def paged_decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    kv_lens: jax.Array,
    block_tables: jax.Array,
    plan: tuple[jax.Array, jax.Array],
    row_tokens: jax.Array | None = None,
    out: jax.Array | None = None,
    *,
    spec: AttentionSpec,
    scale: float,
    config: DecodeConfig,
) -> jax.Array:
    """Attention of one query per row.

    Args:
      q: [T, heads, head_dim]; k_pages, v_pages, kv_lens, block_tables: as in `paged_attention`.
      plan: decode_plan of kv_lens.
      row_tokens: int32 [R], the token of each row's query; None: row r is token r (T == R).
      out: [T, heads, head_dim], with row_tokens only: the results of rows with tokens are written into it, in place
        where it can be; the rest of it stays.
    Returns: [T, heads, head_dim]; without row_tokens, rows without tokens get zeros.
    """
    tokens, heads, head_dim = q.shape
    rows = kv_lens.shape[0]
    workers = config.sms * config.workers
    group_rows = -(-spec.group // 8) * 8
    partials = jax.ShapeDtypeStruct((workers * 2, group_rows, head_dim), jnp.float32)
    lse = jax.ShapeDtypeStruct((workers * 2, group_rows), jnp.float32)
    ring = functools.partial(plgpu.Barrier, num_barriers=config.workers * config.stages)
    dense = row_tokens is None
    # kv_lens only stands in for row_tokens where those are not read.
    row_tokens = kv_lens if row_tokens is None else row_tokens
    queries = q.reshape(tokens * spec.kv_heads, spec.group, head_dim)
    operands = (queries, k_pages, v_pages, kv_lens, block_tables.reshape(-1), row_tokens)
    out_shape = (tokens * spec.kv_heads, spec.group, head_dim)
    run = functools.partial(
        launch,
        functools.partial(_decode_kernel, spec=spec, scale=scale, config=config, dense=dense),
        scratch=dict(
            k_smem=tiled_smem((config.workers, config.stages, config.block, head_dim), k_pages.dtype),
            v_smem=tiled_smem((config.workers, config.stages, config.block, head_dim), v_pages.dtype),
            k_full=ring(num_arrivals=config.block // GRANULE),
            v_full=ring(num_arrivals=config.block // GRANULE),
            k_free=ring(),
            v_free=ring(),
        ),
        grid={"sm": config.sms},
        warpgroups=2 * config.workers,
        name="paged_decode",
    )
    if out is None:
        result, partial, partial_lse = run(
            (*operands, *plan), out_type=(jax.ShapeDtypeStruct(out_shape, q.dtype), partials, lse)
        )
        out_ref = jax.new_ref(result.reshape(tokens * spec.kv_heads, -1), memory_space=plgpu.GMEM)
    else:
        pairs_ref = jax.new_ref(out.reshape(out_shape), memory_space=plgpu.GMEM)
        partial, partial_lse = run((*operands, *plan, pairs_ref), out_type=(partials, lse))
        out_ref = jax.new_ref(jax.freeze(pairs_ref).reshape(tokens * spec.kv_heads, -1), memory_space=plgpu.GMEM)
    # Only pairs that were cut, and empty rows, are left to write.
    launch(
        functools.partial(combine_kernel, spec=spec, dense=dense),
        (partial.reshape(workers * 2, -1), partial_lse, row_tokens, plan[0], plan[1], out_ref),
        scratch={},
        grid={"row": rows, "head": spec.kv_heads},
        name="combine_splits",
    )
    return jax.freeze(out_ref).reshape(tokens, heads, head_dim)


def _decode_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    lens_ref: Any,
    tables_ref: Any,
    row_tokens_ref: Any,
    starts_ref: Any,
    shares_ref: Any,
    out_ref: Any,
    partial_ref: Any,
    lse_ref: Any,
    *,
    k_smem: Any,
    v_smem: Any,
    k_full: Any,
    v_full: Any,
    k_free: Any,
    v_free: Any,
    spec: AttentionSpec,
    scale: float,
    config: DecodeConfig,
    dense: bool,
) -> None:
    wg = lax.axis_index("wg")
    lane = lax.rem(wg, jnp.int32(config.workers))  # which of the SM's workers this warpgroup belongs to
    worker = lane * config.sms + lax.axis_index("sm")
    begin, end, first_row, first_head = (shares_ref[worker, i] for i in range(4))
    table_width = tables_ref.shape[0] // lens_ref.shape[0]

    def for_each_segment(body: Callable[[_Segment], None]) -> None:
        """Calls body for every segment of this worker's share, in the same order in both of its warpgroups."""

        def one(state: Any) -> Any:
            position, row, head, step = state
            row_blocks = starts_ref[row + 1] - starts_ref[row]
            origin = starts_ref[row] * spec.kv_heads + head * row_blocks
            blocks = jnp.minimum(end, origin + row_blocks) - position
            length = lens_ref[row]
            first = lax.div(_first(length, spec), jnp.int32(config.block)) + position - origin
            opens = position == origin
            segment = _Segment(step, row, head, length, first, blocks, opens, opens & (blocks == row_blocks))
            pl.when(blocks > 0)(lambda: body(segment))
            last = (head == spec.kv_heads - 1) | (row_blocks == 0)
            next_row, next_head = jnp.where(last, row + 1, row), jnp.where(last, 0, head + 1)
            return position + blocks, next_row, next_head, step + blocks

        lax.while_loop(lambda state: state[0] < end, one, (begin, first_row, first_head, jnp.int32(0)))

    def ring_slot(step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(config.stages))

    @pl.when(wg >= config.workers)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def process(segment: _Segment) -> None:
            @pl.loop(0, segment.blocks)
            def _(i: jax.Array) -> None:
                slot = ring_slot(segment.step + i)
                barrier = lane * config.stages + slot
                index = segment.first + i
                count = segment.length - index * config.block
                row_offset = segment.row * table_width
                sources = copy_sources(
                    tables_ref, row_offset, index, page_size=spec.page_size, block=config.block, size=GRANULE
                )
                for ref, smem, full, free in ((k_ref, k_smem, k_full, k_free), (v_ref, v_smem, v_full, v_free)):

                    @pl.when(segment.step + i >= config.stages)
                    def _(free: Any = free) -> None:
                        plgpu.barrier_wait(free.at[barrier])

                    copy_block(ref, sources, segment.head, smem.at[lane, slot], full.at[barrier], count)

        for_each_segment(process)

    @pl.when(wg < config.workers)
    def _compute() -> None:
        plgpu.set_max_registers(208, action="increase")

        def process(segment: _Segment) -> None:
            token = segment.row if dense else row_tokens_ref[segment.row]
            pair = token * spec.kv_heads + segment.head
            queries = load_rows(q_ref.at[pair])
            visible_from = _first(segment.length, spec)

            def block(i: jax.Array, state: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
                slot = ring_slot(segment.step + i)
                barrier = lane * config.stages + slot
                begin = (segment.first + i) * config.block
                return _attend_block(
                    queries,
                    k_smem.at[lane, slot],
                    v_smem.at[lane, slot],
                    (k_full.at[barrier], v_full.at[barrier], k_free.at[barrier], v_free.at[barrier]),
                    segment.length - begin,
                    visible_from - begin,
                    state,
                    masked=masked,
                    spec=spec,
                    scale=scale,
                    config=config,
                )

            state = (tile(0, spec.head_dim), column(MASKED), column(0))
            whole = jnp.minimum(lax.div(segment.length, jnp.int32(config.block)) - segment.first, segment.blocks)
            if spec.window is not None or spec.chunk is not None:
                whole = jnp.int32(0)
            state = lax.fori_loop(0, whole, functools.partial(block, masked=False), state)
            acc, top, total = lax.fori_loop(whole, segment.blocks, functools.partial(block, masked=True), state)
            acc = acc / lax.broadcast_in_dim(total, acc.shape, [0])

            @pl.when(segment.whole)
            def _() -> None:
                store_rows(out_ref.at[pair], acc.astype(out_ref.dtype), jnp.int32(0), jnp.int32(spec.group))

            @pl.when(jnp.logical_not(segment.whole))
            def _() -> None:
                place = worker * 2 + segment.opens.astype(jnp.int32)
                store_rows(partial_ref.at[place], acc, jnp.int32(0), jnp.int32(spec.group))
                store_column(lse_ref.at[place], top + jnp.log(total) * LOG2E, jnp.int32(spec.group))

        for_each_segment(process)


def _attend_block(
    queries: jax.Array,
    k_smem: Any,
    v_smem: Any,
    barriers: tuple[Any, Any, Any, Any],
    end: jax.Array,
    begin: jax.Array,
    state: tuple[jax.Array, ...],
    *,
    masked: bool,
    spec: AttentionSpec,
    scale: float,
    config: DecodeConfig,
) -> tuple[jax.Array, ...]:
    """One step of the online softmax over all of a block, or where masked over its tokens [begin, end)."""
    k_full, v_full, k_free, v_free = barriers
    acc, top, total = state
    plgpu.barrier_wait(k_full)

    def scores(acc_ref: Any) -> jax.Array:
        plgpu.wgmma(acc_ref, queries, k_smem.transpose((1, 0)))
        return acc_ref[...]

    qk = pl.run_scoped(scores, plgpu.ACC((TILE_ROWS, config.block), jnp.float32))
    plgpu.barrier_arrive(k_free)
    qk = qk * (scale * LOG2E) if spec.soft_cap is None else cap_scores(qk * scale, spec.soft_cap) * LOG2E
    if masked:
        token = tile_iota((TILE_ROWS, config.block), 1)
        qk = jnp.where((token < end) & (token >= begin), qk, -jnp.inf)
    new_top = jnp.maximum(top, qk.max(axis=1))
    rescale = jnp.exp2(top - new_top)
    weights = jnp.exp2(qk - lax.broadcast_in_dim(new_top, qk.shape, [0]))
    total = total * rescale + weights.sum(axis=1)
    acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])
    plgpu.barrier_wait(v_full)
    if masked:
        clear_rows_from(v_smem, end)
    weights = weights.astype(v_smem.dtype)
    acc = pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, weights, v_smem))(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(v_free)
    return acc, new_top, total
