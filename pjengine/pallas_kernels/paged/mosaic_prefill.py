"""Ragged paged prefill on Hopper: FlashAttention over a device work list of query tiles, in Pallas Mosaic GPU.

One warpgroup copies, two compute 64 queries each (see `flash`). The grid is persistent; tiles are dealt out longest
first, in alternating direction, which evens out causal work without atomics.
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

from pjengine.pallas_kernels.flash import (
    COMPUTE_WARPGROUPS,
    TILE,
    Ring,
    State,
    attend_block,
    initial_state,
    ring_scratch,
    take_turn,
)
from pjengine.pallas_kernels.masking import first_visible, visible
from pjengine.pallas_kernels.mosaic_common import TILE_ROWS, launch, store_rows, tile_iota, tiled_smem
from pjengine.pallas_kernels.paged.pages import copy_block, copy_sources
from pjengine.pallas_kernels.specs import AttentionSpec


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """Tuning of the kernel.

    Attributes:
      block: KV tokens per step, a multiple of 64.
      stages: blocks of K, and of V, in flight.
      sms: streaming multiprocessors of the device.
    """

    block: int
    stages: int
    sms: int


@dataclasses.dataclass(frozen=True)
class _Item:
    """One work item inside the kernel: a tile of queries of one head. All are int32 scalars.

    Attributes:
      lap: how many items this SM had before; step: KV blocks it had before.
      head: query head; row: of the batch.
      token: first token of the tile; begin, end: the row's own queries in it; position: of its first token in the row.
      first, blocks: the KV blocks to read.
    """

    lap: jax.Array
    step: jax.Array
    head: jax.Array
    row: jax.Array
    token: jax.Array
    begin: jax.Array
    end: jax.Array
    position: jax.Array
    first: jax.Array
    blocks: jax.Array


def prefill_plan(query_starts: jax.Array, counts: jax.Array, kv_lens: jax.Array, tokens: int) -> jax.Array:
    """The work list; equal for all layers of a step, so XLA computes it once.

    Args:
      query_starts: int32 [R + 1]; counts: int32 [R], queries of each row, 0 for rows to leave out; kv_lens: int32 [R];
      tokens: static upper bound of the sum of counts.
    Returns: int32 [items, 5], longest first: first token of the tile (a multiple of 8: copies begin there), first and
      end of the row's own queries in the tile, position of the tile's first token, row. In a padding item the end is 0;
      those come last.
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
    plan = jnp.stack([query_starts[row] + offset, jnp.maximum(-offset, 0), stop, position, row], axis=1)
    return plan.astype(jnp.int32)[jnp.argsort(jnp.where(stop > 0, -(position + stop), 1), stable=True)]


@functools.partial(jax.jit, static_argnames=("spec", "scale", "config"))
def paged_prefill(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    kv_lens: jax.Array,
    block_tables: jax.Array,
    plan: jax.Array,
    *,
    spec: AttentionSpec,
    scale: float,
    config: PrefillConfig,
) -> jax.Array:
    """Attention of the plan's queries; other tokens get zeros. q: [T, heads, head_dim]. Returns q's shape."""
    head_dim = spec.head_dim
    copies = config.block // _copy_size(spec, config)
    out_ref = jax.new_ref(jnp.zeros_like(q), memory_space=plgpu.GMEM)
    # TMA wants whole tiles of 8 rows. Only q is padded: a slice behind an in-place call loses what the call left alone.
    q = jnp.pad(q, ((0, -q.shape[0] % 8), (0, 0), (0, 0)))
    launch(
        functools.partial(_prefill_kernel, spec=spec, scale=scale, config=config),
        (q, k_pages, v_pages, kv_lens, block_tables.reshape(-1), plan, out_ref),
        scratch=dict(
            q_smem=tiled_smem((2, COMPUTE_WARPGROUPS, TILE_ROWS, head_dim), q.dtype),
            q_full=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=2),
            q_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=2),
            turns=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            **ring_scratch(config.stages, config.block, head_dim, k_pages.dtype, copies),
        ),
        grid={"sm": config.sms},
        warpgroups=COMPUTE_WARPGROUPS + 1,
        name="paged_prefill",
    )
    return jax.freeze(out_ref)


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
    out_ref: Any,
    *,
    q_smem: Any,
    q_full: Any,
    q_free: Any,
    turns: Any,
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

        def one(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            lap, step, _ = state
            place = lap * config.sms + jnp.where(lax.rem(lap, jnp.int32(2)) == 0, sm, config.sms - 1 - sm)
            index = jnp.minimum(lax.div(place, jnp.int32(spec.heads)), items - 1)
            token, begin, end, position, row = (plan_ref[index, i] for i in range(5))
            end = jnp.where(place < items * spec.heads, end, 0)
            lowest = first_visible(jnp.maximum(position, 0), window=spec.window, chunk=spec.chunk)
            first = lax.div(lowest, block)
            blocks = jnp.where(end > 0, lax.div(position + end + (config.block - 1), block) - first, 0)
            head = lax.rem(place, jnp.int32(spec.heads))
            item = _Item(lap, step, head, row, token, begin, end, position, first, blocks)
            pl.when(end > 0)(lambda: body(item))
            # Padding items come last: the next lap's first item tells all SMs alike whether there is a next lap.
            lead = jnp.minimum(lax.div((lap + 1) * config.sms, jnp.int32(spec.heads)), items - 1)
            more = (plan_ref[lead, 2] > 0) & ((lap + 1) * config.sms < items * spec.heads)
            return lap + 1, step + blocks, more

        lax.while_loop(lambda state: state[2], one, (jnp.int32(0), jnp.int32(0), plan_ref[0, 2] > 0))

    @pl.when(wg == COMPUTE_WARPGROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def process(item: _Item) -> None:
            q_slot = lax.rem(item.lap, jnp.int32(2))

            @pl.when(item.lap >= 2)
            def _() -> None:
                plgpu.barrier_wait(q_free.at[q_slot])

            for i in range(COMPUTE_WARPGROUPS):
                source = q_ref.at[pl.ds(item.token + i * TILE_ROWS, TILE_ROWS), item.head]
                plgpu.copy_gmem_to_smem(source, q_smem.at[q_slot, i], q_full.at[q_slot])
            kv_head = lax.div(item.head, jnp.int32(spec.group))

            @pl.loop(0, item.blocks)
            def _(i: jax.Array) -> None:
                sources = copy_sources(
                    tables_ref,
                    item.row * table_width,
                    item.first + i,
                    page_size=spec.page_size,
                    block=config.block,
                    size=_copy_size(spec, config),
                )

                def copy(name: str, smem: Any, barrier: Any) -> None:
                    copy_block(k_ref if name == "k" else v_ref, sources, kv_head, smem, barrier)

                ring.fill(item.step + i, copy)

        for_each_item(process)

    @pl.when(wg < COMPUTE_WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")

        def process(item: _Item) -> None:
            q_slot = lax.rem(item.lap, jnp.int32(2))
            length = lens_ref[item.row]
            own = item.position + wg * TILE_ROWS  # position of this warpgroup's first query
            plgpu.barrier_wait(q_full.at[q_slot])

            def attend(i: jax.Array, state: State, masked: bool) -> State:
                first_key = (item.first + i) * config.block

                def mask(shape: tuple[int, ...]) -> jax.Array:
                    queries, keys = (x + tile_iota((shape[0], shape[1]), d) for d, x in enumerate((own, first_key)))
                    return visible(queries, keys, causal=True, window=spec.window, chunk=spec.chunk)

                return attend_block(
                    q_smem.at[q_slot, wg],
                    ring,
                    turns,
                    item.step + i,
                    state,
                    scale=scale,
                    soft_cap=spec.soft_cap,
                    mask=mask if masked else None,
                    tokens=length - first_key if masked else None,
                )

            state = initial_state(spec.head_dim)
            unmasked = lax.div(own + 1, block) - item.first  # leading blocks that every query sees whole
            if spec.window is not None or spec.chunk is not None:
                unmasked = jnp.int32(0)
            unmasked = jnp.clip(unmasked, 0, item.blocks)
            state = lax.fori_loop(0, unmasked, functools.partial(attend, masked=False), state)
            acc, _, total = lax.fori_loop(unmasked, item.blocks, functools.partial(attend, masked=True), state)
            plgpu.barrier_arrive(q_free.at[q_slot])
            acc = acc / lax.broadcast_in_dim(total, acc.shape, [0])
            target = out_ref.at[pl.ds(item.token + wg * TILE_ROWS, TILE_ROWS), item.head]
            store_rows(target, acc.astype(out_ref.dtype), item.begin - wg * TILE_ROWS, item.end - wg * TILE_ROWS)

        pl.when(wg == 1)(functools.partial(take_turn, turns))
        for_each_item(process)
        pl.when(wg == 0)(functools.partial(take_turn, turns))
