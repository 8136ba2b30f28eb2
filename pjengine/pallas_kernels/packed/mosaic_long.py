"""Packed attention of long sequences on Hopper: FlashAttention without padding, in Pallas Mosaic GPU.

A work item is a tile of 64 consecutive tokens per computing warpgroup (plan.py), of one head. One more warpgroup copies
the keys from its first token's sequence to its last token's, once for all; each warpgroup computes with the blocks that
its own tokens see (long_steps.py). What a token sees is a range, so that blocks between the borders of a sequence run
unmasked. The grid is persistent.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.backends import TILE_ROWS
from pjengine.pallas_kernels.flash import Ring, ring_scratch
from pjengine.pallas_kernels.flash_joint import Turns
from pjengine.pallas_kernels.mosaic_common import launch, load_whole, tiled_smem
from pjengine.pallas_kernels.packed.long_steps import Part
from pjengine.pallas_kernels.packed.operands import PackedOperands
from pjengine.pallas_kernels.packed.plan import PackedPlan
from pjengine.pallas_kernels.packed.tiles import store_tile
from pjengine.pallas_kernels.specs import AttentionSpec

SHARED_BYTES = 224 * 1024
MOST_STAGES = 8
QUERY_SLOTS = 2  # tiles of queries: the one in use and the one being filled
REAL_TOKENS, PARTS_AT = 6, 8  # columns of the plan's tiles
# Registers a thread when copying and when computing, by computing warpgroups. Together they may be no more than the
# launch allots: a 64 Ki share for each thread, cut to a multiple of 8.
REGISTERS = {2: (40, 232), 3: (32, 160), 4: (32, 112)}


@dataclasses.dataclass(frozen=True)
class LongConfig:
    """Tuning of the kernel.

    Attributes:
      block: KV tokens per step; stages: blocks in flight; sms: streaming multiprocessors of the device.
      warpgroups: computing ones, 2 to 4; turns: they take turns at the tensor cores, for 2.
    """

    block: int
    stages: int
    sms: int
    warpgroups: int
    turns: bool = False

    @property
    def rows(self) -> int:
        """Queries per work item."""
        return self.warpgroups * TILE_ROWS


def long_config(spec: AttentionSpec, sms: int) -> LongConfig:
    """Four warpgroups where their registers hold an accumulator beside a block's scores, else two in turns."""
    warpgroups, turns = (4, False) if spec.head_dim <= 64 else (2, True)
    block = 128 if 64 < spec.head_dim <= 128 else 64
    row = spec.head_dim * jnp.dtype(spec.dtype).itemsize
    stages = (SHARED_BYTES - QUERY_SLOTS * warpgroups * TILE_ROWS * row) // (2 * block * row)
    return LongConfig(block, min(MOST_STAGES, stages), sms, warpgroups, turns)


@functools.partial(jax.jit, static_argnames=("spec", "scale", "config"))
def long_attention(
    operands: PackedOperands, plan: PackedPlan, *, spec: AttentionSpec, scale: float, config: LongConfig
) -> jax.Array:
    """Attention of a plan with config.warpgroups parts of a tile, blocks of config.block: [T, heads, head_dim]."""
    warpgroups = config.warpgroups
    if config.turns and warpgroups != 2:
        raise ValueError(f"turns: two warpgroups take turns, got {warpgroups}")
    ring = ring_scratch(config.stages, config.block, spec.head_dim, operands.dtype, copies=1)
    free = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=config.stages)
    queries = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=QUERY_SLOTS)
    (out,) = launch(
        functools.partial(_kernel, heads_at=operands.heads_at, spec=spec, scale=scale, config=config),
        (*operands.arrays, plan.ranges, plan.tiles),
        out_type=(operands.out_type,),
        scratch=dict(
            q_smem=tiled_smem((QUERY_SLOTS, warpgroups, TILE_ROWS, spec.head_dim), operands.dtype),
            q_full=queries,
            q_free=queries,
            turn_barriers=plgpu.Barrier(num_barriers=warpgroups),
            **{**ring, "k_free": free, "v_free": free},
        ),
        grid={"sm": config.sms},
        warpgroups=warpgroups + 1,
        name="packed_attention_long",
    )
    return out


class _Keys(NamedTuple):
    """What a tile reads: its first key, and how many blocks from there. int32 scalars."""

    first: jax.Array
    blocks: jax.Array


class _Own(NamedTuple):
    """Blocks that any token of a warpgroup's part sees, and those that all of them see whole. int32 scalars."""

    begin: jax.Array
    end: jax.Array
    whole_begin: jax.Array
    whole_end: jax.Array


def _kernel(
    *refs: Any,
    q_smem: Any,
    q_full: Any,
    q_free: Any,
    turn_barriers: Any,
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
    copy_registers, compute_registers = REGISTERS[config.warpgroups]
    tiles = tiles_ref.shape[0]
    laps = lax.div(tiles * spec.heads - sm + (config.sms - 1), jnp.int32(config.sms))

    def tile_of(lap: jax.Array) -> jax.Array:
        return jnp.minimum(lax.div(sm + lap * config.sms, jnp.int32(spec.heads)), tiles - 1)

    def head_of(lap: jax.Array) -> jax.Array:
        return lax.rem(sm + lap * config.sms, jnp.int32(spec.heads))

    def keys_of(lap: jax.Array) -> _Keys:
        return _Keys(*(tiles_ref[tile_of(lap), i] for i in (2, 3)))

    @pl.when(wg == config.warpgroups)
    def _copy() -> None:
        plgpu.set_max_registers(copy_registers, action="decrease")

        def process(lap: jax.Array, carry: tuple[jax.Array, _Keys]) -> tuple[jax.Array, _Keys]:
            step, keys = carry
            following = keys_of(lap + 1)
            q_slot, head = lax.rem(lap, jnp.int32(QUERY_SLOTS)), head_of(lap)
            pl.when(lap >= QUERY_SLOTS)(lambda: plgpu.barrier_wait(q_free.at[q_slot]))
            for i in range(config.warpgroups):
                rows = pl.ds(tile_of(lap) * config.rows + i * TILE_ROWS, TILE_ROWS)
                plgpu.copy_gmem_to_smem(q_ref.at[rows, heads_at[0] + head], q_smem.at[q_slot, i], q_full.at[q_slot])
            kv_head = lax.div(head, jnp.int32(spec.group))

            @pl.loop(0, keys.blocks)
            def _(i: jax.Array) -> None:
                rows = pl.ds(keys.first + i * config.block, config.block)

                def copy(name: str, smem: Any, barrier: Any) -> None:
                    ref, at = (k_ref, heads_at[1]) if name == "k" else (v_ref, heads_at[2])
                    plgpu.copy_gmem_to_smem(ref.at[rows, at + kv_head], smem, barrier)

                ring.fill(step + i, copy)

            return step + keys.blocks, following

        lax.fori_loop(0, laps, process, (jnp.int32(0), keys_of(jnp.int32(0))))

    @pl.when(wg < config.warpgroups)
    def _compute() -> None:
        plgpu.set_max_registers(compute_registers, action="increase")
        turns = Turns(turn_barriers, wg) if config.turns else None
        real_tokens = tiles_ref[0, REAL_TOKENS]

        def token_of(lap: jax.Array) -> jax.Array:
            return tile_of(lap) * config.rows + wg * TILE_ROWS

        def own_of(lap: jax.Array) -> _Own:
            return _Own(*(tiles_ref[tile_of(lap), PARTS_AT + 4 * wg + i] for i in range(4)))

        def seen_by(lap: jax.Array) -> tuple[jax.Array, ...]:
            """First and end of the keys that each row sees."""
            rows, vector = pl.ds(token_of(lap), TILE_ROWS), plgpu.Layout.WGMMA.reduce(1)
            return tuple(load_whole(ranges_ref.at[i, rows], vector, optimized=False) for i in range(2))

        def process(lap: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            step, keys, own, (low, high) = carry
            following = keys_of(lap + 1), own_of(lap + 1), seen_by(lap + 1)  # loads that nothing waits for yet
            q_slot = lax.rem(lap, jnp.int32(QUERY_SLOTS))
            queries = q_smem.at[q_slot, wg]
            part = Part(
                queries,
                ring,
                step,
                keys.first,
                low,
                high,
                own.whole_begin,
                own.whole_end,
                real_tokens,
                scale,
                spec.soft_cap,
            )
            plgpu.barrier_wait(q_full.at[q_slot])
            part.pass_over(jnp.int32(0), own.begin, turns)

            @pl.when(own.begin < own.end)
            def _() -> None:
                if turns is None:
                    acc, total = part.attend_freely(own.begin, own.end)
                else:
                    acc, total = part.attend_in_turns(own.begin, own.end, turns)
                part.pass_over(own.end, keys.blocks, turns)
                inverse = 1.0 / jnp.where(total == 0, 1.0, total)  # padding tokens see nothing
                acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
                token = token_of(lap)
                target, end = out_ref.at[pl.ds(token, TILE_ROWS), head_of(lap)], out_ref.shape[0] - token
                store_tile(queries, target, acc.astype(out_ref.dtype), jnp.int32(0), end)

            if turns is not None:

                @pl.when(own.begin >= own.end)
                def _() -> None:  # all take as many turns
                    turns.wait()
                    turns.hand_over()

            plgpu.barrier_arrive(q_free.at[q_slot])
            return step + keys.blocks, *following

        if turns is not None:
            pl.when(wg == 1)(turns.hand_over)  # the first turn is the other's
        zero = jnp.int32(0)
        lax.fori_loop(0, laps, process, (zero, keys_of(zero), own_of(zero), seen_by(zero)))
