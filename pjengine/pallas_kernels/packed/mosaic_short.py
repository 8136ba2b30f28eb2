"""Packed attention of short sequences on Hopper, in Pallas Mosaic GPU: several tiles of 64 queries in flight per SM.

A work item is a tile of whole sequences (plan.py) of one head. Most items meet a single block of keys, so there is no
loop to pipeline: each warpgroup works alone on items of its own and has copied the next item's q, k and v to shared
memory while it works on this one. Several warpgroups per SM hide one another's latencies.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.backends import TILE_ROWS
from pjengine.pallas_kernels.mosaic_common import (
    MASKED,
    clear_rows_from,
    column,
    launch,
    load_whole,
    scaled_exp2,
    tiled_smem,
)
from pjengine.pallas_kernels.packed.operands import PackedOperands
from pjengine.pallas_kernels.packed.plan import GRANULE, PackedPlan
from pjengine.pallas_kernels.packed.tiles import in_units, mask_unless, store_tile
from pjengine.pallas_kernels.specs import AttentionSpec

SLOTS = 2  # of q and of k and v per warpgroup: the one in use and the one being filled
MOST_WARPGROUPS = 3
SHARED_BYTES = 224 * 1024

State = tuple[jax.Array, jax.Array, jax.Array]  # accumulator [64, head_dim], running maximum [64] of scores, sum [64]


@dataclasses.dataclass(frozen=True)
class ShortConfig:
    """Tuning of the kernel: keys per step, 64 or 128; warpgroups per SM, each with items of its own; streaming
    multiprocessors of the device.
    """

    block: int
    warpgroups: int
    sms: int


def short_config(spec: AttentionSpec, sms: int, block: int = TILE_ROWS) -> ShortConfig:
    """As many warpgroups as shared memory has room for."""
    one = SLOTS * (TILE_ROWS + 2 * block) * spec.head_dim * jnp.dtype(spec.dtype).itemsize
    return ShortConfig(block, min(MOST_WARPGROUPS, SHARED_BYTES // one), sms)


def fitted(config: ShortConfig, items: int) -> ShortConfig:
    """The config with no more workers than there can be items: a grid for few starts sooner."""
    sms = min(config.sms, items)
    return dataclasses.replace(config, warpgroups=min(config.warpgroups, math.ceil(items / sms)), sms=sms)


@functools.partial(jax.jit, static_argnames=("spec", "scale", "config"))
def short_attention(
    operands: PackedOperands, plan: PackedPlan, *, spec: AttentionSpec, scale: float, config: ShortConfig
) -> jax.Array:
    """Attention of a plan with tiles of TILE_ROWS and blocks of config.block: [T, heads, head_dim]."""
    slots = config.warpgroups * SLOTS
    kv_smem = tiled_smem((config.warpgroups, SLOTS, config.block, spec.head_dim), operands.dtype)
    (out,) = launch(
        functools.partial(_kernel, heads_at=operands.heads_at, spec=spec, scale=scale, config=config),
        (*operands.arrays, plan.ranges, plan.tiles),
        out_type=(operands.out_type,),
        scratch=dict(
            q_smem=tiled_smem((config.warpgroups, SLOTS, TILE_ROWS, spec.head_dim), operands.dtype),
            k_smem=kv_smem,
            v_smem=kv_smem,
            q_full=plgpu.Barrier(num_barriers=slots),
            kv_full=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        ),
        grid={"sm": config.sms},
        warpgroups=config.warpgroups,
        name="packed_attention_short",
    )
    return out


class _Tile(NamedTuple):
    """One tile inside the kernel, as plan.py describes it. All are int32 scalars."""

    first: jax.Array
    last: jax.Array
    key: jax.Array
    blocks: jax.Array
    whole_begin: jax.Array
    whole_end: jax.Array


def _kernel(
    *refs: Any,
    q_smem: Any,
    k_smem: Any,
    v_smem: Any,
    q_full: Any,
    kv_full: Any,
    heads_at: tuple[int, int, int],
    spec: AttentionSpec,
    scale: float,
    config: ShortConfig,
) -> None:
    *sources, ranges_ref, tiles_ref, out_ref = refs
    q_ref, k_ref, v_ref = sources if len(sources) == 3 else sources * 3
    wg, sm = lax.axis_index("wg"), lax.axis_index("sm")
    stride = config.sms * config.warpgroups
    # Neighbours in the order of items are neighbouring SMs: few items then have an SM each.
    worker = wg * config.sms + sm

    def row_of(lap: jax.Array) -> jax.Array:
        most = tiles_ref.shape[0] - 1
        return jnp.minimum(lax.div(worker + lap * stride, jnp.int32(spec.heads)), most)

    def read(lap: jax.Array) -> _Tile:
        row = row_of(lap)
        return _Tile(*(tiles_ref[row, i] for i in range(len(_Tile._fields))))

    def head_of(lap: jax.Array) -> jax.Array:
        return lax.rem(worker + lap * stride, jnp.int32(spec.heads))

    def seen_by(tile: _Tile) -> tuple[jax.Array, ...]:
        """First and end of the keys that each row sees."""
        rows, row = pl.ds(_aligned(tile.first), TILE_ROWS), plgpu.Layout.WGMMA.reduce(1)
        return tuple(load_whole(ranges_ref.at[i, rows], row, optimized=False) for i in range(2))

    def fetch_q(tile: _Tile, head: jax.Array, slot: jax.Array) -> None:
        source = q_ref.at[pl.ds(_aligned(tile.first), TILE_ROWS), heads_at[0] + head]
        plgpu.copy_gmem_to_smem(source, q_smem.at[wg, slot], q_full.at[wg * SLOTS + slot])

    def fetch_kv(tile: _Tile, head: jax.Array, block: jax.Array, slot: jax.Array) -> None:
        kv_head, rows = lax.div(head, jnp.int32(spec.group)), pl.ds(tile.key + block * config.block, config.block)
        for ref, at, smem in ((k_ref, heads_at[1], k_smem), (v_ref, heads_at[2], v_smem)):
            plgpu.copy_gmem_to_smem(ref.at[rows, at + kv_head], smem.at[wg, slot], kv_full.at[wg * SLOTS + slot])

    # All that the first item needs is one load away; loads of two laps later are under way, so that none is waited for.
    real_tokens, count = (tiles_ref[row_of(jnp.int32(0)), len(_Tile._fields) + i] for i in range(2))
    items = count * spec.heads
    laps = lax.div(items - worker + (stride - 1), jnp.int32(stride))

    def process(lap: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, tile, (begin, end), following = carry
        later = read(lap + 2)
        seen_next = seen_by(following)
        head = head_of(lap)
        q_slot = lax.rem(lap, jnp.int32(SLOTS))
        plgpu.barrier_wait(q_full.at[wg * SLOTS + q_slot])

        def attend(i: jax.Array, state: State | None) -> State:
            slot = lax.rem(step + i, jnp.int32(SLOTS))
            first_key = tile.key + i * config.block

            def fetch_next() -> None:
                # What was in the other slots has been read: the copy waits for all of the warpgroup first.
                pl.when(i + 1 < tile.blocks)(lambda: fetch_kv(tile, head, i + 1, 1 - slot))

                @pl.when((i + 1 == tile.blocks) & (lap + 1 < laps))
                def _() -> None:
                    next_head = head_of(lap + 1)
                    fetch_q(following, next_head, 1 - q_slot)
                    fetch_kv(following, next_head, jnp.int32(0), 1 - slot)

            plgpu.barrier_wait(kv_full.at[wg * SLOTS + slot])
            keys = k_smem.at[wg, slot].transpose((1, 0))
            scores = _product(q_smem.at[wg, q_slot], keys, config.block, meanwhile=fetch_next)
            scores, factor = in_units(scores, scale, spec.soft_cap)
            whole = (i >= tile.whole_begin) & (i < tile.whole_end)
            scores = mask_unless(whole, scores, begin - first_key, end - first_key)
            new_top = jnp.maximum(column(MASKED) if state is None else state[1], scores.max(axis=1))
            weights = scaled_exp2(scores, factor, new_top * factor, 0)
            total = weights.sum(axis=1)
            weights = weights.astype(v_smem.dtype)
            clear_rows_from(v_smem.at[wg, slot], real_tokens - first_key)
            if state is None:
                return _product(weights, v_smem.at[wg, slot], spec.head_dim), new_top, total
            acc, top, old_total = state
            rescale = jnp.exp2((top - new_top) * factor)
            acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])
            acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, v_smem.at[wg, slot]))(plgpu.ACC.init(acc))
            return acc, new_top, old_total * rescale + total

        state = attend(jnp.int32(0), None)
        acc, _, total = lax.fori_loop(1, tile.blocks, attend, state)
        inverse = 1.0 / jnp.where(total == 0, 1.0, total)  # padding tokens see nothing
        acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
        base = _aligned(tile.first)
        target = out_ref.at[pl.ds(base, TILE_ROWS), head]
        # The next queries to come into this slot are fetched after the warpgroup's next barrier.
        store_tile(q_smem.at[wg, q_slot], target, acc.astype(out_ref.dtype), tile.first - base, tile.last - base)
        return step + tile.blocks, following, seen_next, later

    tile = read(jnp.int32(0))

    @pl.when(laps > 0)
    def _() -> None:
        head = head_of(jnp.int32(0))
        fetch_q(tile, head, jnp.int32(0))
        fetch_kv(tile, head, jnp.int32(0), jnp.int32(0))

    lax.fori_loop(0, laps, process, (jnp.int32(0), tile, seen_by(tile), read(jnp.int32(1))))


def _aligned(token: jax.Array) -> jax.Array:
    return lax.div(token, jnp.int32(GRANULE)) * GRANULE


def _product(left: Any, right: Any, columns: int, meanwhile: Callable[[], None] | None = None) -> jax.Array:
    """float32 [64, columns] of left, in registers or shared memory, times right in shared memory.

    Args:
      meanwhile: called while the product is being computed.
    """

    def multiply(acc_ref: Any) -> jax.Array:
        plgpu.wgmma(acc_ref, left, right)
        if meanwhile is not None:
            meanwhile()
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((TILE_ROWS, columns), jnp.float32))
