"""Packed attention of long sequences on Hopper: FlashAttention without padding, in Pallas Mosaic GPU.

A work item is a tile of up to 128 consecutive tokens (plan.py) of one head. It reads the keys from its first token's
sequence to its last token's; what a token sees of them is a range, so that blocks between the borders of a sequence
run unmasked. The grid is persistent.
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
    initial_state,
    ring_scratch,
    take_turn,
)
from pjengine.pallas_kernels.mosaic_common import (
    TILE_ROWS,
    clear_rows_from,
    launch,
    load_whole,
    scaled_exp2,
    tiled_smem,
)
from pjengine.pallas_kernels.packed.operands import PackedOperands
from pjengine.pallas_kernels.packed.plan import GRANULE, PackedPlan
from pjengine.pallas_kernels.packed.tiles import in_units, mask_unless, store_tile
from pjengine.pallas_kernels.specs import AttentionSpec

SHARED_BYTES = 224 * 1024
MOST_STAGES = 8


@dataclasses.dataclass(frozen=True)
class LongConfig:
    """Tuning of the kernel: KV tokens per step, blocks in flight, streaming multiprocessors of the device."""

    block: int
    stages: int
    sms: int


def long_config(spec: AttentionSpec, sms: int) -> LongConfig:
    """Blocks of 128 keys where registers and shared memory allow it."""
    block = 128 if spec.head_dim <= 128 else 64
    row = spec.head_dim * jnp.dtype(spec.dtype).itemsize
    return LongConfig(block, min(MOST_STAGES, (SHARED_BYTES - 2 * TILE * row) // (2 * block * row)), sms)


@functools.partial(jax.jit, static_argnames=("spec", "scale", "config"))
def long_attention(
    operands: PackedOperands, plan: PackedPlan, *, spec: AttentionSpec, scale: float, config: LongConfig
) -> jax.Array:
    """Attention of a plan with tiles of TILE and blocks of config.block: [T, heads, head_dim]."""
    (out,) = launch(
        functools.partial(_kernel, heads_at=operands.heads_at, spec=spec, scale=scale, config=config),
        (*operands.arrays, plan.ranges, plan.tiles),
        out_type=(operands.out_type,),
        scratch=dict(
            q_smem=tiled_smem((2, COMPUTE_WARPGROUPS, TILE_ROWS, spec.head_dim), operands.dtype),
            q_full=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=2),
            q_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=2),
            turns=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            **ring_scratch(config.stages, config.block, spec.head_dim, operands.dtype, copies=1),
        ),
        grid={"sm": config.sms},
        warpgroups=COMPUTE_WARPGROUPS + 1,
        name="packed_attention_long",
    )
    return out


@dataclasses.dataclass(frozen=True)
class _Item:
    """One work item inside the kernel: a tile of one head. All are int32 scalars.

    Attributes:
      lap: how many items this SM had before; step: KV blocks it had before.
      head: which query head; base: token of the tile's first row.
      first, last: rows of the tile's first token and past its last.
      key: first key to read; blocks: how many; whole_begin, whole_end: those that every token sees whole.
    """

    lap: jax.Array
    step: jax.Array
    head: jax.Array
    base: jax.Array
    first: jax.Array
    last: jax.Array
    key: jax.Array
    blocks: jax.Array
    whole_begin: jax.Array
    whole_end: jax.Array


def _kernel(
    *refs: Any,
    q_smem: Any,
    q_full: Any,
    q_free: Any,
    turns: Any,
    heads_at: tuple[int, int, int],
    spec: AttentionSpec,
    scale: float,
    config: LongConfig,
    **ring_refs: Any,
) -> None:
    *sources, ranges_ref, tiles_ref, out_ref = refs
    q_ref, k_ref, v_ref = sources if len(sources) == 3 else sources * 3
    wg, sm = lax.axis_index("wg"), lax.axis_index("sm")
    ring = Ring(**ring_refs)
    real_tokens, count = (tiles_ref[0, i] for i in (6, 7))
    items = count * spec.heads

    def for_each_item(body: Callable[[_Item], None]) -> None:
        """Calls body for every work item of this SM, in the same order in every warpgroup."""

        def read(lap: jax.Array) -> tuple[jax.Array, ...]:
            tile = lax.div(sm + lap * config.sms, jnp.int32(spec.heads))
            return tuple(tiles_ref[jnp.minimum(tile, tiles_ref.shape[0] - 1), i] for i in range(6))

        def one(lap: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            step, (first, last, key, blocks, *whole) = carry
            following = read(lap + 1)
            head = lax.rem(sm + lap * config.sms, jnp.int32(spec.heads))
            base = lax.div(first, jnp.int32(GRANULE)) * GRANULE
            body(_Item(lap, step, head, base, first - base, last - base, key, blocks, *whole))
            return step + blocks, following

        laps = lax.div(items - sm + (config.sms - 1), jnp.int32(config.sms))
        lax.fori_loop(0, laps, one, (jnp.int32(0), read(jnp.int32(0))))

    @pl.when(wg == COMPUTE_WARPGROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def process(item: _Item) -> None:
            q_slot = lax.rem(item.lap, jnp.int32(2))

            @pl.when(item.lap >= 2)
            def _() -> None:
                plgpu.barrier_wait(q_free.at[q_slot])

            for i in range(COMPUTE_WARPGROUPS):
                source = q_ref.at[pl.ds(item.base + i * TILE_ROWS, TILE_ROWS), heads_at[0] + item.head]
                plgpu.copy_gmem_to_smem(source, q_smem.at[q_slot, i], q_full.at[q_slot])
            kv_head = lax.div(item.head, jnp.int32(spec.group))

            @pl.loop(0, item.blocks)
            def _(i: jax.Array) -> None:
                rows = pl.ds(item.key + i * config.block, config.block)

                def copy(name: str, smem: Any, barrier: Any) -> None:
                    ref, at = (k_ref, heads_at[1]) if name == "k" else (v_ref, heads_at[2])
                    plgpu.copy_gmem_to_smem(ref.at[rows, at + kv_head], smem, barrier)

                ring.fill(item.step + i, copy)

        for_each_item(process)

    @pl.when(wg < COMPUTE_WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")

        def process(item: _Item) -> None:
            q_slot = lax.rem(item.lap, jnp.int32(2))
            token = item.base + wg * TILE_ROWS
            vector = plgpu.Layout.WGMMA.reduce(1)
            begin, end = (
                load_whole(ranges_ref.at[i, pl.ds(token, TILE_ROWS)], vector, optimized=False) for i in range(2)
            )
            plgpu.barrier_wait(q_full.at[q_slot])

            def attend(i: jax.Array, state: State) -> State:
                acc, top, total = state
                slot, first_key = lax.rem(item.step + i, jnp.int32(config.stages)), item.key + i * config.block
                plgpu.barrier_wait(ring.k_full.at[slot])

                def multiply(acc_ref: Any) -> jax.Array:
                    plgpu.wgmma(acc_ref, q_smem.at[q_slot, wg], ring.k.at[slot].transpose((1, 0)))
                    take_turn(turns)
                    return acc_ref[...]

                scores = pl.run_scoped(multiply, plgpu.ACC((TILE_ROWS, config.block), jnp.float32))
                plgpu.barrier_arrive(ring.k_free.at[slot])
                scores, factor = in_units(scores, scale, spec.soft_cap)
                whole = (i >= item.whole_begin) & (i < item.whole_end)
                scores = mask_unless(whole, scores, begin - first_key, end - first_key)
                new_top = jnp.maximum(top, scores.max(axis=1))
                rescale = jnp.exp2((top - new_top) * factor)
                weights = scaled_exp2(scores, factor, new_top * factor, 0)
                acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])
                total = total * rescale + weights.sum(axis=1)
                weights = weights.astype(ring.v.dtype)
                acc, total, new_top, weights = lax.optimization_barrier((acc, total, new_top, weights))
                plgpu.barrier_arrive(turns)
                plgpu.barrier_wait(ring.v_full.at[slot])
                # Both warpgroups clear, each before it reads: they write equal bytes.
                clear_rows_from(ring.v.at[slot], real_tokens - first_key)
                plgpu.barrier_wait(turns)
                acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, ring.v.at[slot]))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(ring.v_free.at[slot])
                return acc, new_top, total

            acc, _, total = lax.fori_loop(0, item.blocks, attend, initial_state(spec.head_dim))
            inverse = 1.0 / jnp.where(total == 0, 1.0, total)  # padding tokens see nothing
            acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
            target, skipped = out_ref.at[pl.ds(token, TILE_ROWS), item.head], wg * TILE_ROWS
            values = acc.astype(out_ref.dtype)
            store_tile(q_smem.at[q_slot, wg], target, values, item.first - skipped, item.last - skipped)
            plgpu.barrier_arrive(q_free.at[q_slot])

        pl.when(wg == 1)(functools.partial(take_turn, turns))
        for_each_item(process)
        pl.when(wg == 0)(functools.partial(take_turn, turns))
