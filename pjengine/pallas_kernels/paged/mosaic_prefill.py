"""Ragged paged prefill on Hopper: FlashAttention over a device work list of query tiles, in Pallas Mosaic GPU.

One warpgroup copies, and widens a float8 cache; two compute 64 queries each (see `flash_joint`), from the last block of
keys to the first. The grid is persistent; tiles are dealt out longest first, in alternating direction, which evens out
causal work without atomics.
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

from pjengine.pallas_kernels.backends import TILE_ROWS
from pjengine.pallas_kernels.flash import COMPUTE_WARPGROUPS, TILE, Ring, finish, ring_scratch
from pjengine.pallas_kernels.flash_joint import Mask, Scores, State, Turns, first_block, last_values, next_block
from pjengine.pallas_kernels.masking import first_visible, visible
from pjengine.pallas_kernels.mosaic_common import LOG2E, clear_memory, launch, tile_iota, tiled_smem
from pjengine.pallas_kernels.paged.pages import copy_block, copy_sources, page_numbers, page_tokens
from pjengine.pallas_kernels.paged.widen import widen_block
from pjengine.pallas_kernels.row_store import store_staged_rows
from pjengine.pallas_kernels.specs import AttentionSpec


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """Tuning of the kernel.

    Attributes:
      block: KV tokens per step, a multiple of 64.
      stages: blocks of K, and of V, in flight, at least 2; query_stages: tiles of queries.
      sms: streaming multiprocessors of the device.
    """

    block: int
    stages: int
    query_stages: int
    sms: int


@dataclasses.dataclass(frozen=True)
class _Item:
    """One work item inside the kernel: a tile of queries of one head. All are int32 scalars.

    Attributes:
      lap: how many items this SM had before; step: KV blocks it had before.
      head: query head; row: of the batch.
      token: first token of the tile; begin, end: the row's own queries in it; position: of its first token in the row.
      length: the row's KV tokens; first, blocks: the KV blocks to read.
    """

    lap: jax.Array
    step: jax.Array
    head: jax.Array
    row: jax.Array
    token: jax.Array
    begin: jax.Array
    end: jax.Array
    position: jax.Array
    length: jax.Array
    first: jax.Array
    blocks: jax.Array


def prefill_plan(query_starts: jax.Array, counts: jax.Array, kv_lens: jax.Array, tokens: int) -> jax.Array:
    """The work list; equal for all layers of a step, so XLA computes it once.

    Args:
      query_starts: int32 [R + 1]; counts: int32 [R], queries of each row, 0 for rows to leave out; kv_lens: int32 [R];
      tokens: static upper bound of the sum of counts.
    Returns: int32 [items, 6], longest first: first token of the tile (a multiple of 8: copies begin there), first and
      end of the row's own queries in the tile, position of the tile's first token, row, the row's KV tokens. In a
      padding item the end is 0; those come last.
    """
    rows = counts.shape[0]
    skew = query_starts[:-1] % 8
    tiles = jnp.where(counts > 0, -(-(counts + skew) // TILE), 0)
    ends = jnp.cumsum(tiles)
    # A row of n >= 2 queries takes at most (n + 7 + TILE - 1) / TILE tiles.
    items = jnp.arange((tokens + (TILE + 6) * min(rows, tokens // 2)) // TILE + 1, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None, :] <= items[:, None], axis=1, dtype=jnp.int32), rows - 1)
    offset = (items - (ends - tiles)[row]) * TILE - skew[row]  # of the tile's first token from the row's first
    stop = jnp.where(items < ends[-1], jnp.minimum(counts[row] - offset, TILE), 0)
    position = kv_lens[row] - counts[row] + offset
    plan = jnp.stack([query_starts[row] + offset, jnp.maximum(-offset, 0), stop, position, row, kv_lens[row]], axis=1)
    return plan.astype(jnp.int32)[jnp.argsort(jnp.where(stop > 0, -jnp.maximum(position + stop, 0), 1), stable=True)]


@functools.partial(jax.jit, static_argnames=("spec", "scale", "config"))
def paged_prefill(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    kv_lens: jax.Array,
    block_tables: jax.Array,
    plan: jax.Array,
    tokens: jax.Array,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    *,
    spec: AttentionSpec,
    scale: float,
    config: PrefillConfig,
) -> jax.Array:
    """Attention of the plan's queries; tokens that no row owns get zeros, those of rows outside the plan stay unset.

    Args:
      q: [T, heads, head_dim]; tokens: int32 [1], how many of them rows own; sinks: [heads]; k_scale, v_scale:
        float32 [kv_heads] where spec.kv_scales; others as in `paged_attention`.
    Returns: q's shape.
    """
    if config.stages < 2:
        raise ValueError(f"stages: a block is waited for before the one before it is free, got {config.stages}")
    head_dim = spec.head_dim
    copies = config.block // _copy_size(spec, config)
    widens = k_pages.dtype != q.dtype
    ring_copies = 1 if widens else copies
    narrow = {}
    if widens:
        block = tiled_smem((config.block, head_dim), k_pages.dtype)
        full = plgpu.Barrier(num_arrivals=copies)
        narrow = dict(k_narrow=block, v_narrow=block, k_narrow_full=full, v_narrow_full=full)
    # What is off is not read; kv_lens only stands in for it.
    options = (
        kv_lens if sinks is None else sinks.astype(jnp.float32),
        *(kv_lens if x is None else x for x in (k_scale, v_scale)),
    )
    out_type = jax.ShapeDtypeStruct(q.shape, q.dtype)
    # TMA wants whole tiles of 8 rows. Only q is padded: a slice behind an in-place call loses what the call left alone.
    q = jnp.pad(q, ((0, -q.shape[0] % 8), (0, 0), (0, 0)))
    (out,) = launch(
        functools.partial(_prefill_kernel, spec=spec, scale=scale, config=config),
        (q, k_pages, v_pages, kv_lens, block_tables.reshape(-1), plan, tokens, *options),
        out_type=(out_type,),
        scratch=dict(
            q_smem=tiled_smem((config.query_stages, COMPUTE_WARPGROUPS, TILE_ROWS, head_dim), q.dtype),
            q_full=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=config.query_stages),
            q_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=config.query_stages),
            turn_barriers=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
            **narrow,
            **ring_scratch(config.stages, config.block, head_dim, q.dtype, ring_copies),
        ),
        grid={"sm": config.sms},
        warpgroups=COMPUTE_WARPGROUPS + 1,
        name="paged_prefill",
    )
    return out


def _copy_size(spec: AttentionSpec, config: PrefillConfig) -> int:
    """Tokens per TMA copy: a page, or the part of one that a block takes."""
    return min(spec.page_size or config.block, config.block)


def _prefill_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    lens_ref: Any,
    tables_ref: Any,
    plan_ref: Any,
    tokens_ref: Any,
    sinks_ref: Any,
    k_scale_ref: Any,
    v_scale_ref: Any,
    out_ref: Any,
    *,
    q_smem: Any,
    q_full: Any,
    q_free: Any,
    turn_barriers: Any,
    k_narrow: Any = None,
    v_narrow: Any = None,
    k_narrow_full: Any = None,
    v_narrow_full: Any = None,
    spec: AttentionSpec,
    scale: float,
    config: PrefillConfig,
    **ring_refs: Any,
) -> None:
    wg, sm = lax.axis_index("wg"), lax.axis_index("sm")
    ring = Ring(**ring_refs)
    items = plan_ref.shape[0]
    table_width = tables_ref.shape[0] // lens_ref.shape[0]
    block = jnp.int32(config.block)

    def for_each_item(body: Callable[[_Item], None]) -> None:
        """Calls body for every work item of this SM, in the same order in every warpgroup."""

        def read(lap: jax.Array) -> tuple[jax.Array, ...]:
            """(head, the plan's entry) of this SM's item; the end of a padding item is 0."""
            place = lap * config.sms + jnp.where(lax.rem(lap, jnp.int32(2)) == 0, sm, config.sms - 1 - sm)
            index = jnp.minimum(lax.div(place, jnp.int32(spec.heads)), items - 1)
            token, begin, end, position, row, length = (plan_ref[index, i] for i in range(6))
            end = jnp.where(place < items * spec.heads, end, 0)
            return lax.rem(place, jnp.int32(spec.heads)), token, begin, end, position, row, length

        def one(state: tuple[Any, ...]) -> tuple[Any, ...]:
            lap, step, entry = state
            following = read(lap + 1)  # early: its latency passes behind this item
            head, token, begin, end, position, row, length = entry
            lowest = first_visible(jnp.maximum(position, 0), window=spec.window, chunk=spec.chunk)
            first = lax.div(lowest, block)
            # A row without KV tokens has one block, of which its queries see nothing.
            blocks = jnp.maximum(lax.div(position + end + (config.block - 1), block) - first, 1)
            item = _Item(lap, step, head, row, token, begin, end, position, length, first, blocks)
            body(item)
            return lap + 1, step + blocks, following

        # Padding items come last, so that an SM's first one ends its list.
        lax.while_loop(lambda state: state[2][3] > 0, one, (jnp.int32(0), jnp.int32(0), read(jnp.int32(0))))

    @pl.when(wg == COMPUTE_WARPGROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(40 if k_narrow is None else 72, action="decrease")

        def process(item: _Item) -> None:
            q_slot = lax.rem(item.lap, jnp.int32(config.query_stages))

            @pl.when(item.lap >= config.query_stages)
            def _() -> None:
                plgpu.barrier_wait(q_free.at[q_slot])

            for i in range(COMPUTE_WARPGROUPS):
                source = q_ref.at[pl.ds(item.token + i * TILE_ROWS, TILE_ROWS), item.head]
                plgpu.copy_gmem_to_smem(source, q_smem.at[q_slot, i], q_full.at[q_slot])
            kv_head = lax.div(item.head, jnp.int32(spec.group))

            def sources(i: jax.Array) -> Any:
                """From the last block to the first: what the masks cut short comes first."""
                block, sizes = item.first + item.blocks - 1 - i, {"page_size": page_tokens(spec), "block": config.block}
                pages = page_numbers(tables_ref, item.row * table_width, block, **sizes)
                return copy_sources(pages, block, size=_copy_size(spec, config), **sizes)

            if k_narrow is None:

                @pl.loop(0, item.blocks)
                def _(i: jax.Array) -> None:
                    places = sources(i)

                    def copy(name: str, smem: Any, barrier: Any) -> None:
                        copy_block(k_ref if name == "k" else v_ref, places, kv_head, smem, barrier)

                    ring.fill(item.step + i, copy)

                return

            narrow = {"k": (k_ref, k_narrow, k_narrow_full), "v": (v_ref, v_narrow, v_narrow_full)}

            def start(name: str, i: jax.Array) -> None:
                ref, smem, full = narrow[name]
                copy_block(ref, sources(i), kv_head, smem, full)

            start("k", jnp.int32(0))
            start("v", jnp.int32(0))

            @pl.loop(0, item.blocks)
            def _(i: jax.Array) -> None:
                def widen(name: str, smem: Any, barrier: Any) -> None:
                    _, source, full = narrow[name]
                    plgpu.barrier_wait(full)
                    widen_block(source, smem)
                    plgpu.commit_smem()  # also: every thread has read `source`
                    plgpu.barrier_arrive(barrier)
                    pl.when(i + 1 < item.blocks)(lambda: start(name, i + 1))

                ring.fill(item.step + i, widen)

        for_each_item(process)
        heads_bytes = spec.heads * spec.head_dim * out_ref.dtype.itemsize

        unowned = tokens_ref[0] + sm

        @pl.loop(0, lax.div(out_ref.shape[0] - unowned + (config.sms - 1), jnp.int32(config.sms)))
        def _(lap: jax.Array) -> None:
            clear_memory(out_ref.at[unowned + lap * config.sms], heads_bytes)

    @pl.when(wg < COMPUTE_WARPGROUPS)
    def _compute() -> None:
        turns = Turns(turn_barriers, wg)
        plgpu.set_max_registers(232 if k_narrow is None else 216, action="increase")

        def process(item: _Item) -> None:
            q_slot = lax.rem(item.lap, jnp.int32(config.query_stages))
            kv_head = lax.div(item.head, jnp.int32(spec.group))
            score_scale = scale * k_scale_ref[kv_head] if spec.kv_scales else scale
            own = item.position + wg * TILE_ROWS  # position of this warpgroup's first query
            plgpu.barrier_wait(q_full.at[q_slot])

            scores = Scores(score_scale, spec.soft_cap)
            queries = q_smem.at[q_slot, wg]

            def first_key(i: jax.Array) -> jax.Array:
                return (item.first + item.blocks - 1 - i) * config.block

            def mask_of(i: jax.Array) -> Mask:
                def mask(shape: tuple[int, ...]) -> jax.Array:
                    positions, keys = (
                        x + tile_iota((shape[0], shape[1]), d) for d, x in enumerate((own, first_key(i)))
                    )
                    return visible(positions, keys, causal=True, window=spec.window, chunk=spec.chunk)

                return mask

            def attend(i: jax.Array, state: State, masked: bool) -> State:
                return next_block(queries, ring, turns, item.step + i, state, scores, mask_of(i) if masked else None)

            whole = lax.div(own + 1, block) - item.first  # leading blocks that every query sees whole
            if spec.window is not None or spec.chunk is not None:
                whole = jnp.int32(0)
            masked = item.blocks - jnp.clip(whole, 0, item.blocks - 1)
            start = first_key(jnp.int32(0))
            half = own + TILE_ROWS <= start + config.block // 2 if config.block > TILE_ROWS else None
            state = first_block(
                queries,
                ring,
                turns,
                item.step,
                scores,
                mask_of(jnp.int32(0)),
                half,
                item.length - start,
                spec.head_dim,
            )
            state = lax.fori_loop(1, masked, functools.partial(attend, masked=True), state)
            state = lax.fori_loop(masked, item.blocks, functools.partial(attend, masked=False), state)
            result = last_values(ring, turns, item.step + item.blocks - 1, state)
            acc, total = finish(result, sinks_ref[item.head] * LOG2E if spec.sinks else None)
            factor = v_scale_ref[kv_head] / total if spec.kv_scales else 1 / total
            acc = acc * lax.broadcast_in_dim(factor, acc.shape, [0])
            queries[...] = acc.astype(out_ref.dtype)  # their place is free now
            plgpu.commit_smem()
            skipped = wg * TILE_ROWS
            target = out_ref.at[pl.ds(item.token + skipped, TILE_ROWS), item.head]
            store_staged_rows(queries, target, item.begin - skipped, item.end - skipped, spec.heads * spec.head_dim)
            plgpu.barrier_arrive(q_free.at[q_slot])

        pl.when(wg == 1)(turns.hand_over)  # the first turn is the other's
        for_each_item(process)
