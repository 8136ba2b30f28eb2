"""Paged decode on Hopper: split-KV with a perfectly even split, in Pallas Mosaic GPU.

The KV blocks of all (row, KV head) pairs stand in one line, row by row and head by head. Each worker takes an equal,
contiguous piece of that line, so that ragged lengths cost nothing: a worker is busy until its piece ends, whatever rows
it crosses, and its copies run ahead across row borders. Where a pair is cut, its pieces leave partial results; who is
last to leave one combines them (as in FlashDecoding; the even cut is Stream-K's, Osama et al. 2023, arXiv:2301.03598).
Short pairs are not cut: see `decode_plan`.

A worker is a pair of warpgroups: one issues the TMA copies and stages queries, one computes. Scores are computed
transposed, with K as the left operand: a product then has 8 or 16 columns, not 64 rows for a few query heads.

A step of nothing but decoding rows can have its projections normalised, rotated and written to the pages on the way
(`paged_decode_qkv`): who stages a row's queries also makes its key and value, and they do not go through the pages to
the block that needs them: that one is copied with whatever stood in their place, and corrected in shared memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.mosaic_common import (
    LOG2E,
    MASKED,
    clear_memory,
    launch,
    tile,
    tiled_smem,
)
from pjengine.pallas_kernels.paged import decode_tiles as tiles
from pjengine.pallas_kernels.paged.decode_new_token import NewTokens, stage_projection
from pjengine.pallas_kernels.paged.decode_plan import DecodeConfig, Plan, first_key, worker_fields
from pjengine.pallas_kernels.paged.decode_segments import Segment, for_each_segment
from pjengine.pallas_kernels.paged.decode_step import State, attend_block
from pjengine.pallas_kernels.paged.mosaic_combine import combine_pieces, partial_size
from pjengine.pallas_kernels.paged.pages import copy_block, copy_sources, page_numbers, page_tokens
from pjengine.pallas_kernels.specs import AttentionSpec


@functools.partial(jax.jit, static_argnames=("spec", "scale", "config"))
def paged_decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    kv_lens: jax.Array,
    block_tables: jax.Array,
    plan: Plan,
    row_tokens: jax.Array | None = None,
    out: jax.Array | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    *,
    spec: AttentionSpec,
    scale: float,
    config: DecodeConfig,
) -> jax.Array:
    """Attention of one query per row.

    Args:
      q: [T, heads, head_dim]; k_scale, v_scale: float32 [kv_heads] where spec.kv_scales; k_pages, v_pages,
        block_tables, sinks: as in `paged_attention`.
      kv_lens: int32 [R]; 0 for a row whose result is zeros, negative for one to leave alone.
      plan: decode_plan of kv_lens and block_tables.
      row_tokens: int32 [R], the token of each row's query; None: row r is token r (T == R).
      out: [T, heads, head_dim], with row_tokens only: the results are written into it, in place where it can be; the
        rest of it stays.
    Returns: [T, heads, head_dim].
    """
    queries = q.reshape(-1, spec.group, spec.head_dim)
    optional = (
        row_tokens,
        None if sinks is None else sinks.astype(jnp.float32).reshape(spec.kv_heads, spec.group),
        k_scale,
        v_scale,
    )
    # What is off is not read; kv_lens only stands in for it.
    stand_ins = (kv_lens if x is None else x for x in optional)
    operands = (queries, k_pages, v_pages, kv_lens, block_tables.reshape(-1), *stand_ins, *plan)
    run = functools.partial(
        _launch, pairs=queries.shape[0], spec=spec, scale=scale, config=config, dense=row_tokens is None
    )
    if out is None:
        return run(operands).reshape(q.shape)
    out_ref = jax.new_ref(out.reshape(queries.shape[0], -1), memory_space=plgpu.GMEM)
    run((*operands, out_ref), in_place=True)
    return jax.freeze(out_ref).reshape(q.shape)


@functools.partial(jax.jit, static_argnames=("spec", "scale", "config", "norm_eps"))
def paged_decode_qkv(
    qkv: jax.Array,
    new: NewTokens,
    k_pages: jax.Array,
    v_pages: jax.Array,
    kv_lens: jax.Array,
    block_tables: jax.Array,
    plan: Plan,
    *,
    spec: AttentionSpec,
    scale: float,
    config: DecodeConfig,
    norm_eps: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of one query per row, of a fused projection that is rotated and written to the pages on the way.

    Args:
      qkv: [T, heads + 2 * kv_heads, head_dim], in the pages' 16-bit dtype; row r is token r, its last one.
      norm_eps: of the norms in `new`, None where there are none.
      The others: as in `paged_decode`.
    Returns: [T, heads, head_dim], k_pages, v_pages.
    """
    k_ref, v_ref = (jax.new_ref(x, memory_space=plgpu.GMEM) for x in (k_pages, v_pages))
    operands = (qkv, k_ref, v_ref, kv_lens, block_tables.reshape(-1), *[kv_lens] * 4, *plan)
    out = _launch(
        (*operands, new.cos, new.sin, new.slots, *new.norms),
        pairs=qkv.shape[0] * spec.kv_heads,
        spec=spec,
        scale=scale,
        config=config,
        dense=True,
        fused=True,
        norm_eps=norm_eps,
    )
    return out.reshape(qkv.shape[0], spec.heads, spec.head_dim), jax.freeze(k_ref), jax.freeze(v_ref)


def _launch(
    operands: tuple[Any, ...],
    *,
    pairs: int,
    spec: AttentionSpec,
    scale: float,
    config: DecodeConfig,
    dense: bool,
    in_place: bool = False,
    fused: bool = False,
    norm_eps: float | None = None,
) -> Any:
    """Runs the kernel. Returns: [pairs, group * head_dim], unless results go to the last operand, in_place."""
    head_dim, workers = spec.head_dim, config.sms * config.workers
    dtype, kv_dtype = jnp.dtype(spec.dtype), jnp.dtype(spec.kv_dtype)
    columns = -(-spec.group // 8) * 8
    result = jax.ShapeDtypeStruct((pairs, spec.group * head_dim), dtype)
    partials = jax.ShapeDtypeStruct((workers * 2, partial_size(spec.group, head_dim)), jnp.float32)
    lse = jax.ShapeDtypeStruct((workers * 2, columns), jnp.float32)
    ring = functools.partial(plgpu.Barrier, num_barriers=config.workers * config.stages)
    staged = plgpu.Barrier(num_barriers=config.workers * 2)
    operand_dtype = dtype if kv_dtype.itemsize == 2 else jnp.dtype(jnp.float16)
    copy_size = min(page_tokens(spec), config.block)
    scratch = dict(
        k_smem=tiled_smem((config.workers, config.stages, config.block, head_dim), kv_dtype),
        v_smem=tiled_smem((config.workers, config.stages, config.block, head_dim), kv_dtype),
        q_smem=tiled_smem((config.workers, 2, columns, head_dim), operand_dtype),
        weights_smem=tiled_smem((config.workers, columns, config.block), operand_dtype),
        scratch=plgpu.SMEM((config.workers, 4 * columns), jnp.float32),
        last=plgpu.SMEM((config.workers, 1), jnp.int32),
        k_full=ring(num_arrivals=config.block // copy_size),
        v_full=ring(num_arrivals=config.block // copy_size),
        free=ring(),
        q_full=staged,
        q_free=staged,
    )
    if fused:
        scratch["token_smem"] = plgpu.SMEM((config.workers, 2, 2, head_dim), dtype)
    results = launch(
        functools.partial(
            _decode_kernel, spec=spec, scale=scale, config=config, dense=dense, fused=fused, norm_eps=norm_eps
        ),
        operands,
        out_type=(partials, lse) if in_place else (result, partials, lse),
        scratch=scratch,
        grid={"sm": config.sms},
        warpgroups=2 * config.workers,
        name="paged_decode_qkv" if fused else "paged_decode",
    )
    return None if in_place else results[0]


def _decode_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    lens_ref: Any,
    tables_ref: Any,
    row_tokens_ref: Any,
    sinks_ref: Any,
    k_scale_ref: Any,
    v_scale_ref: Any,
    starts_ref: Any,
    shares_ref: Any,
    counters_ref: Any,
    *others: Any,
    k_smem: Any,
    v_smem: Any,
    q_smem: Any,
    weights_smem: Any,
    scratch: Any,
    last: Any,
    k_full: Any,
    v_full: Any,
    free: Any,
    q_full: Any,
    q_free: Any,
    token_smem: Any = None,
    spec: AttentionSpec,
    scale: float,
    config: DecodeConfig,
    dense: bool,
    fused: bool,
    norm_eps: float | None,
) -> None:
    """q_ref: [pairs, group, head_dim]; where `fused`, the projection, and NewTokens stand before the outputs."""
    *tokens, out_ref, partial_ref, lse_ref = others
    new = NewTokens(tokens[0], tokens[1], tokens[2], tuple(tokens[3:])) if fused else None
    wg = lax.axis_index("wg")
    lane = lax.rem(wg, jnp.int32(config.workers))  # which of the SM's workers this warpgroup belongs to
    worker = lane * config.sms + lax.axis_index("sm")
    own = worker_fields([shares_ref[worker, i] for i in range(shares_ref.shape[1])])
    rows = lens_ref.shape[0]
    sizes = {"page_size": page_tokens(spec), "block": config.block}
    table_width = tables_ref.shape[0] // rows
    columns, head_dim = q_smem.shape[-2:]
    permuted = not tiles.values_from_shared(v_smem.dtype, head_dim)

    def each_segment(body: Callable[[Segment], None]) -> None:
        for_each_segment(body, own, starts_ref, lens_ref, spec, config.block)

    def ring_slot(step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(config.stages))

    def query_pair(row: jax.Array, head: jax.Array) -> jax.Array:
        return (row if dense else row_tokens_ref[row]) * spec.kv_heads + head

    def stage_queries(segment: Segment, place: jax.Array) -> None:
        if new is not None:
            stage_projection(
                q_ref,
                new,
                (k_ref, v_ref),
                segment.row,
                segment.head,
                ((segment.first + segment.blocks) * config.block >= segment.length).astype(jnp.int32),
                q_smem.at[lane, place],
                token_smem.at[lane, place],
                spec=spec,
                norm_eps=norm_eps,
            )
            plgpu.commit_smem()
            return
        queries = q_ref.at[query_pair(segment.row, segment.head)]
        tiles.stage_queries(queries, q_smem.at[lane, place], permuted=not tiles.keys_from_shared(k_smem.dtype))
        plgpu.commit_smem()

    @pl.when(wg >= config.workers)
    def _copy() -> None:
        plgpu.set_max_registers(config.copy_registers, action="decrease")

        def process(segment: Segment) -> None:
            @pl.loop(0, segment.blocks)
            def _(i: jax.Array) -> None:
                slot = ring_slot(segment.step + i)
                barrier = lane * config.stages + slot
                index = segment.first + i
                count = segment.length - index * config.block
                # The first block does not wait for the block table.
                pages = lax.cond(
                    segment.step + i == 0,
                    lambda: list(own.pages),
                    lambda: page_numbers(tables_ref, segment.row * table_width, index, **sizes),
                )
                sources = copy_sources(pages, index, size=min(sizes.values()), **sizes)
                pl.when(segment.step + i >= config.stages)(functools.partial(plgpu.barrier_wait, free.at[barrier]))
                for ref, smem, full in ((k_ref, k_smem, k_full), (v_ref, v_smem, v_full)):
                    copy_block(ref, sources, segment.head, smem.at[lane, slot], full.at[barrier], count)

                # The worker's first queries are the computing warpgroup's: it has nothing else to do yet.
                @pl.when((i == 0) & (segment.ordinal > 0))
                def _stage() -> None:
                    place = lax.rem(segment.ordinal, jnp.int32(2))
                    barrier = lane * 2 + place

                    @pl.when(segment.ordinal >= 2)
                    def _() -> None:
                        plgpu.barrier_wait(q_free.at[barrier])

                    stage_queries(segment, place)
                    plgpu.barrier_arrive(q_full.at[barrier])

        each_segment(process)

        @pl.loop(0, pl.cdiv(rows, config.sms * config.workers))
        def _(lap: jax.Array) -> None:
            row = lap * (config.sms * config.workers) + worker

            @pl.when(row < rows)
            def _() -> None:
                @pl.when((lens_ref[row] == 0) if not dense else (lens_ref[row] <= 0))
                def _() -> None:
                    whole = out_ref.at[pl.ds(query_pair(row, jnp.int32(0)), spec.kv_heads)]
                    clear_memory(whole, spec.heads * head_dim * out_ref.dtype.itemsize)

    @pl.when(wg < config.workers)
    def _compute() -> None:
        plgpu.set_max_registers(config.compute_registers, action="increase")

        def process(segment: Segment) -> None:
            pair = query_pair(segment.row, segment.head)
            place = lax.rem(segment.ordinal, jnp.int32(2))
            visible_from = first_key(segment.length, spec)
            score_scale, factor = jnp.float32(scale), jnp.float32(1)
            if spec.kv_scales:
                score_scale, factor = score_scale * k_scale_ref[segment.head], v_scale_ref[segment.head]
            pl.when(segment.ordinal == 0)(functools.partial(stage_queries, segment, place))
            pl.when(segment.ordinal > 0)(functools.partial(plgpu.barrier_wait, q_full.at[lane * 2 + place]))

            def block(i: jax.Array, state: State, masked: bool) -> State:
                slot = ring_slot(segment.step + i)
                barrier = lane * config.stages + slot
                begin = (segment.first + i) * config.block
                return attend_block(
                    q_smem.at[lane, place],
                    k_smem.at[lane, slot],
                    v_smem.at[lane, slot],
                    weights_smem.at[lane],
                    scratch.at[lane],
                    (k_full.at[barrier], v_full.at[barrier], free.at[barrier]),
                    (visible_from - begin, segment.length - begin) if masked else None,
                    state,
                    scale=score_scale,
                    soft_cap=spec.soft_cap,
                    newest=(token_smem.at[lane, place], segment.length - 1 - begin) if fused and masked else None,
                )

            column = functools.partial(jnp.full, (columns,), dtype=jnp.float32)
            state = (
                tile(0, columns, tiles.padded_rows(head_dim)),
                plgpu.layout_cast(column(MASKED), tiles.COLUMNS),
                tile(0, columns, config.block),
            )
            # The new token is put over a copied one in the masked form only: its block is no whole one.
            old = segment.length - 1 if fused else segment.length
            whole = jnp.minimum(lax.div(old, jnp.int32(config.block)) - segment.first, segment.blocks)
            if spec.window is not None or spec.chunk is not None:
                whole = jnp.int32(0)
            state = lax.fori_loop(0, whole, functools.partial(block, masked=False), state)
            acc, top, weights = lax.fori_loop(whole, segment.blocks, functools.partial(block, masked=True), state)
            plgpu.barrier_arrive(q_free.at[lane * 2 + place])
            total = tiles.reduce_tokens(weights, scratch.at[lane], largest=False)
            if spec.sinks:
                # The sink joins the piece that opens the pair.
                sink = tiles.load_vector(sinks_ref.at[segment.head], columns) * LOG2E
                sink = jnp.where(segment.opens, sink, jnp.full_like(sink, MASKED))
                new_top = jnp.maximum(top, sink)
                rescale = jnp.exp2(top - new_top)
                acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [1])
                total = total * rescale + jnp.exp2(sink - new_top)
                top = new_top
            acc = acc * lax.broadcast_in_dim(factor / total, acc.shape, [1])

            @pl.when(segment.whole)
            def _() -> None:
                result = acc.astype(out_ref.dtype)
                tiles.store_columns(out_ref.at[pair], result, spec.group, head_dim, permuted=permuted)

            @pl.when(jnp.logical_not(segment.whole))
            def _() -> None:
                piece = worker * 2 + segment.opens.astype(jnp.int32)
                tiles.store_columns(partial_ref.at[piece], acc, spec.group, head_dim, permuted=permuted)
                tiles.store_vector(lse_ref.at[piece], top + jnp.log(total) * LOG2E)
                first_worker = lax.div(segment.origin, own.share)
                last_worker = lax.div(segment.origin + segment.row_blocks - 1, own.share)
                counter = segment.row * spec.kv_heads + segment.head
                tiles.last_to_arrive(counters_ref, counter, last_worker - first_worker + 1, last.at[lane])

                @pl.when(last[lane, 0] == 1)
                def _() -> None:
                    combine_pieces(
                        partial_ref,
                        lse_ref,
                        out_ref.at[pair],
                        first_worker,
                        last_worker,
                        spec=spec,
                        unroll=config.unroll,
                    )

        each_segment(process)
