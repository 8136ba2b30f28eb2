"""Packed attention of short sequences on Hopper, in Pallas Mosaic GPU: several tiles of 64 queries in flight per SM.

A work item is a tile of whole sequences (plan.py) of one head. Most items meet a single block of keys, so there is no
loop to pipeline: each warpgroup works alone on items of its own and has copied the next item's q, k and v to shared
memory while it works on this one. Several warpgroups per SM hide one another's latencies.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.masking import cap_scores
from pjengine.pallas_kernels.mosaic_common import (
    LOG2E,
    MASKED,
    TILE_ROWS,
    clear_rows_from,
    column,
    launch,
    load_whole,
    store_rows,
    tile_iota,
    tiled_smem,
)
from pjengine.pallas_kernels.packed.operands import PackedOperands
from pjengine.pallas_kernels.packed.plan import GRANULE, PackedPlan
from pjengine.pallas_kernels.specs import AttentionSpec

BLOCK = TILE_ROWS  # keys per step
SLOTS = 2  # of q and of k and v per warpgroup: the one in use and the one being filled
MOST_WARPGROUPS = 4
SHARED_BYTES = 224 * 1024


@dataclasses.dataclass(frozen=True)
class ShortConfig:
    """Tuning of the kernel: warpgroups per SM, each with items of its own; streaming multiprocessors of the device."""

    warpgroups: int
    sms: int


def short_config(spec: AttentionSpec, sms: int) -> ShortConfig:
    """As many warpgroups as shared memory has room for."""
    one = SLOTS * (TILE_ROWS + 2 * BLOCK) * spec.head_dim * jnp.dtype(spec.dtype).itemsize
    return ShortConfig(min(MOST_WARPGROUPS, SHARED_BYTES // one), sms)


@functools.partial(jax.jit, static_argnames=("spec", "scale", "config"))
def short_attention(
    operands: PackedOperands, plan: PackedPlan, *, spec: AttentionSpec, scale: float, config: ShortConfig
) -> jax.Array:
    """Attention of a plan with tiles of TILE_ROWS and blocks of BLOCK: [T, heads, head_dim]."""
    shape = (config.warpgroups, SLOTS, TILE_ROWS, spec.head_dim)
    barrier = plgpu.Barrier(num_barriers=config.warpgroups * SLOTS)
    (out,) = launch(
        functools.partial(_kernel, heads_at=operands.heads_at, spec=spec, scale=scale, config=config),
        (*operands.arrays, plan.ranges, plan.tiles, plan.count, plan.real_tokens),
        out_type=(operands.out_type,),
        scratch=dict(
            **{name: tiled_smem(shape, operands.dtype) for name in ("q_smem", "k_smem", "v_smem")},
            **{name: barrier for name in ("q_full", "k_full", "v_full")},
        ),
        grid={"sm": config.sms},
        warpgroups=config.warpgroups,
        name="packed_attention_short",
    )
    return out


def _kernel(
    *refs: Any,
    q_smem: Any,
    k_smem: Any,
    v_smem: Any,
    q_full: Any,
    k_full: Any,
    v_full: Any,
    heads_at: tuple[int, int, int],
    spec: AttentionSpec,
    scale: float,
    config: ShortConfig,
) -> None:
    *sources, ranges_ref, tiles_ref, count_ref, real_tokens_ref, out_ref = refs
    q_ref, k_ref, v_ref = sources if len(sources) == 3 else sources * 3
    wg, sm = lax.axis_index("wg"), lax.axis_index("sm")
    stride = config.sms * config.warpgroups
    worker = sm * config.warpgroups + wg
    items = count_ref[0] * spec.heads
    laps = lax.div(items - worker + (stride - 1), jnp.int32(stride))

    def read(lap: jax.Array) -> tuple[Any, ...]:
        """(head, first and end of the tile's tokens, first key, blocks, first and end of the keys each row sees)."""
        place = jnp.minimum(worker + lap * stride, items - 1)
        tile, head = lax.div(place, jnp.int32(spec.heads)), lax.rem(place, jnp.int32(spec.heads))
        first, last, key, blocks = (tiles_ref[tile, i] for i in range(4))
        rows = pl.ds(_aligned(first), TILE_ROWS)
        seen = (load_whole(ranges_ref.at[i, rows], plgpu.Layout.WGMMA.reduce(1), optimized=False) for i in range(2))
        return head, first, last, key, blocks, *seen

    def fetch_q(item: tuple[Any, ...], slot: jax.Array) -> None:
        head, first, *_ = item
        source = q_ref.at[pl.ds(_aligned(first), TILE_ROWS), heads_at[0] + head]
        plgpu.copy_gmem_to_smem(source, q_smem.at[wg, slot], q_full.at[wg * SLOTS + slot])

    def fetch_kv(item: tuple[Any, ...], block: jax.Array, slot: jax.Array) -> None:
        head, _, _, key, *_ = item
        kv_head, rows = lax.div(head, jnp.int32(spec.group)), pl.ds(key + block * BLOCK, BLOCK)
        for ref, at, smem, full in ((k_ref, heads_at[1], k_smem, k_full), (v_ref, heads_at[2], v_smem, v_full)):
            plgpu.copy_gmem_to_smem(ref.at[rows, at + kv_head], smem.at[wg, slot], full.at[wg * SLOTS + slot])

    def process(lap: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, item = carry[0], carry[1:]
        following = read(lap + 1)
        head, first, last, key, blocks, begin, end = item
        q_slot = lax.rem(lap, jnp.int32(SLOTS))
        plgpu.barrier_wait(q_full.at[wg * SLOTS + q_slot])

        def attend(i: jax.Array, state: tuple[jax.Array, ...] | None) -> tuple[jax.Array, ...]:
            slot = lax.rem(step + i, jnp.int32(SLOTS))
            # What was in the other slots has been read: the copy waits for all of the warpgroup first.
            pl.when(i + 1 < blocks)(lambda: fetch_kv(item, i + 1, 1 - slot))

            @pl.when((i + 1 == blocks) & (lap + 1 < laps))
            def _() -> None:
                fetch_q(following, 1 - q_slot)
                fetch_kv(following, jnp.int32(0), 1 - slot)

            place, first_key = wg * SLOTS + slot, key + i * BLOCK
            plgpu.barrier_wait(k_full.at[place])
            qk = _product(q_smem.at[wg, q_slot], k_smem.at[wg, slot].transpose((1, 0)), BLOCK)
            qk = qk * (scale * LOG2E) if spec.soft_cap is None else cap_scores(qk * scale, spec.soft_cap) * LOG2E
            token = tile_iota((TILE_ROWS, BLOCK), 1)
            above = token >= lax.broadcast_in_dim(begin - first_key, qk.shape, [0])
            qk = jnp.where(above & (token < lax.broadcast_in_dim(end - first_key, qk.shape, [0])), qk, -jnp.inf)
            new_top = jnp.maximum(column(MASKED) if state is None else state[1], qk.max(axis=1))
            weights = jnp.exp2(qk - lax.broadcast_in_dim(new_top, qk.shape, [0]))
            total = weights.sum(axis=1)
            weights = weights.astype(v_smem.dtype)
            plgpu.barrier_wait(v_full.at[place])
            clear_rows_from(v_smem.at[wg, slot], real_tokens_ref[0] - first_key)
            if state is None:
                return _product(weights, v_smem.at[wg, slot], spec.head_dim), new_top, total
            acc, top, old_total = state
            rescale = jnp.exp2(top - new_top)
            acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])
            acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, v_smem.at[wg, slot]))(plgpu.ACC.init(acc))
            return acc, new_top, old_total * rescale + total

        state = attend(jnp.int32(0), None)
        acc, _, total = lax.fori_loop(1, blocks, attend, state)
        total = jnp.where(total == 0, 1.0, total)  # padding tokens see nothing
        acc = acc / lax.broadcast_in_dim(total, acc.shape, [0])
        base = _aligned(first)
        target = out_ref.at[pl.ds(base, TILE_ROWS), head]
        store_rows(target, acc.astype(out_ref.dtype), first - base, last - base)
        return step + blocks, *following

    item = read(jnp.int32(0))

    @pl.when(laps > 0)
    def _() -> None:
        fetch_q(item, jnp.int32(0))
        fetch_kv(item, jnp.int32(0), jnp.int32(0))

    lax.fori_loop(0, laps, process, (jnp.int32(0), *item))


def _aligned(token: jax.Array) -> jax.Array:
    return lax.div(token, jnp.int32(GRANULE)) * GRANULE


def _product(left: Any, right: Any, columns: int) -> jax.Array:
    """float32 [64, columns] of left, in registers or shared memory, times right in shared memory."""

    def multiply(acc_ref: Any) -> jax.Array:
        plgpu.wgmma(acc_ref, left, right)
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((TILE_ROWS, columns), jnp.float32))
