"""Packed attention of long sequences on Hopper: FlashAttention without padding, in Pallas Mosaic GPU.

A work item is a tile of up to 64 consecutive tokens per computing warpgroup (plan.py), of one head. It reads the keys
from its first token's sequence to its last token's once for all warpgroups; each computes with those blocks that its
own tokens see. What a token sees is a range, so that blocks between the borders of a sequence run unmasked. The
warpgroups go at paces of their own: one's softmax passes behind the products of the others. The grid is persistent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.flash import Ring, ring_scratch
from pjengine.pallas_kernels.flash_joint import SLACK, State, first_block, last_values, next_block
from pjengine.pallas_kernels.mosaic_common import (
    MASKED,
    TILE_ROWS,
    clear_rows_from,
    column,
    launch,
    load_whole,
    scaled_exp2,
    tile,
    tiled_smem,
)
from pjengine.pallas_kernels.packed.operands import PackedOperands
from pjengine.pallas_kernels.packed.plan import GRANULE, PackedPlan
from pjengine.pallas_kernels.packed.tiles import in_units, mask_unless, store_tile
from pjengine.pallas_kernels.specs import AttentionSpec
from pjengine.pallas_kernels.tile_softmax import PARTS, add_parts, rescale_if_needed

SHARED_BYTES = 224 * 1024
MOST_STAGES = 8
TILE_COLUMNS = 8  # of a plan's rows, before those of the parts
# Registers a thread: (copying, computing) for as many computing warpgroups. Together no more than a launch allots,
# 64 Ki by threads, cut to a multiple of 8.
REGISTERS = {(1, 2): (40, 232), (1, 3): (32, 160), (1, 4): (32, 112), (2, 2): (32, 104)}

Columns = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class LongConfig:
    """Tuning of the kernel: KV tokens per step, blocks in flight, streaming multiprocessors of the device, computing
    warpgroups per SM. joint: products of two blocks leave together; turns: the two warpgroups take turns.
    """

    block: int
    stages: int
    sms: int
    warpgroups: int = 2
    joint: bool = False
    turns: bool = False
    chained: bool = False
    teams: int = 1
    at_borders: bool = False

    @property
    def rows(self) -> int:
        """Queries per work item."""
        return self.warpgroups * TILE_ROWS


def long_config(
    spec: AttentionSpec, sms: int, block: int = 128, warpgroups: int = 2, joint: bool = False, turns: bool = False,
    teams: int = 1, chained: bool = False, at_borders: bool = False,
) -> LongConfig:
    """Blocks of 128 keys where registers and shared memory allow it."""
    block = block if spec.head_dim <= 128 else 64
    row = spec.head_dim * jnp.dtype(spec.dtype).itemsize
    stages = min(MOST_STAGES, (SHARED_BYTES // teams - 2 * warpgroups * TILE_ROWS * row) // (2 * block * row))
    return LongConfig(block, stages, sms, warpgroups, joint, turns, chained, teams, at_borders)


@functools.partial(jax.jit, static_argnames=("spec", "scale", "config"))
def long_attention(
    operands: PackedOperands, plan: PackedPlan, *, spec: AttentionSpec, scale: float, config: LongConfig
) -> jax.Array:
    """Attention of a plan with tiles of config.rows in config.warpgroups parts: [T, heads, head_dim]."""
    warpgroups, teams = config.warpgroups, config.teams
    (out,) = launch(
        functools.partial(_kernel, heads_at=operands.heads_at, spec=spec, scale=scale, config=config),
        (*operands.arrays, plan.ranges, plan.tiles),
        out_type=(operands.out_type,),
        scratch=dict(
            q_smem=tiled_smem((2 * teams, warpgroups, TILE_ROWS, spec.head_dim), operands.dtype),
            q_full=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=2 * teams),
            q_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=2 * teams),
            turn_barriers=plgpu.Barrier(num_barriers=warpgroups * teams),
            **ring_scratch(config.stages * teams, config.block, spec.head_dim, operands.dtype, copies=1, readers=warpgroups),
        ),
        grid={"sm": config.sms},
        warpgroups=(warpgroups + 1) * teams,
        name="packed_attention_long",
    )
    return out


class _Tile(NamedTuple):
    """One tile inside the kernel, as plan.py describes it. All are int32 scalars."""

    first: jax.Array
    last: jax.Array
    key: jax.Array
    blocks: jax.Array


class _Part(NamedTuple):
    """A warpgroup's part of a tile: blocks that any of its tokens sees, those that all of them see."""

    begin: jax.Array
    end: jax.Array
    whole_begin: jax.Array
    whole_end: jax.Array


class _RoundTurns(NamedTuple):
    """The order at the tensor cores: a barrier per warpgroup of a team, at which the one before it arrives."""

    barriers: Any
    base: Any
    wg: jax.Array
    warpgroups: int

    def wait(self) -> None:
        plgpu.barrier_wait(self.barriers.at[self.base + self.wg])

    def hand_over(self) -> None:
        plgpu.barrier_arrive(self.barriers.at[self.base + lax.rem(self.wg + 1, jnp.int32(self.warpgroups))])


class _NoTurns(NamedTuple):
    def wait(self) -> None: ...

    def hand_over(self) -> None: ...


class _Weights(NamedTuple):
    """How scores become weights; stands in for flash_joint.Scores."""

    scale: float
    soft_cap: float | None

    def weigh(
        self, qk: jax.Array, top: jax.Array, total: jax.Array, mask: Columns, dtype: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        scores, factor = in_units(qk, self.scale, self.soft_cap)
        scores = mask(scores)
        block_top = scores.max(axis=1) * factor
        new_top = jnp.where(block_top > top + SLACK, block_top, top)
        rescale = jnp.exp2(top - new_top)
        weights = scaled_exp2(scores, factor, new_top, 0)
        total = add_parts(total * lax.broadcast_in_dim(rescale, total.shape, [0]), weights)
        total, narrow = lax.optimization_barrier((total, weights.astype(dtype)))
        return new_top, total, narrow, rescale


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
    thread, sm = lax.axis_index("wg"), lax.axis_index("sm")
    copies = thread >= config.teams * config.warpgroups
    team = jnp.where(copies, thread - config.teams * config.warpgroups, lax.div(thread, jnp.int32(config.warpgroups)))
    wg = lax.rem(thread, jnp.int32(config.warpgroups))  # of the team; of a computing one
    worker, workers = sm + team * config.sms, config.sms * config.teams
    ring = Ring(**ring_refs, base=team * config.stages, size=config.stages)
    block = config.block
    copy_registers, compute_registers = REGISTERS[config.teams, config.warpgroups]
    real_tokens, count = (tiles_ref[0, i] for i in (6, 7))
    items = count * spec.heads
    laps = lax.div(items - worker + (workers - 1), jnp.int32(workers))

    def row_of(lap: jax.Array) -> jax.Array:
        return jnp.minimum(lax.div(worker + lap * workers, jnp.int32(spec.heads)), tiles_ref.shape[0] - 1)

    def read(lap: jax.Array) -> _Tile:
        row = row_of(lap)
        return _Tile(*(tiles_ref[row, i] for i in range(4)))

    def read_part(lap: jax.Array) -> _Part:
        row = row_of(lap)
        return _Part(*(tiles_ref[row, TILE_COLUMNS + 4 * wg + i] for i in range(4)))

    def head_of(lap: jax.Array) -> jax.Array:
        return lax.rem(worker + lap * workers, jnp.int32(spec.heads))

    @pl.when(copies)
    def _copy() -> None:
        plgpu.set_max_registers(copy_registers, action="decrease")

        def process(lap: jax.Array, carry: tuple[jax.Array, _Tile]) -> tuple[jax.Array, _Tile]:
            step, item = carry
            following = read(lap + 1)
            q_slot, head = team * 2 + lax.rem(lap, jnp.int32(2)), head_of(lap)
            pl.when(lap >= 2)(lambda: plgpu.barrier_wait(q_free.at[q_slot]))
            for i in range(config.warpgroups):
                source = q_ref.at[pl.ds(_aligned(item.first) + i * TILE_ROWS, TILE_ROWS), heads_at[0] + head]
                plgpu.copy_gmem_to_smem(source, q_smem.at[q_slot, i], q_full.at[q_slot])
            kv_head = lax.div(head, jnp.int32(spec.group))

            @pl.loop(0, item.blocks)
            def _(i: jax.Array) -> None:
                rows = pl.ds(item.key + i * block, block)

                def copy(name: str, smem: Any, barrier: Any) -> None:
                    ref, at = (k_ref, heads_at[1]) if name == "k" else (v_ref, heads_at[2])
                    plgpu.copy_gmem_to_smem(ref.at[rows, at + kv_head], smem, barrier)

                ring.fill(step + i, copy)

            return step + item.blocks, following

        lax.fori_loop(0, laps, process, (jnp.int32(0), read(jnp.int32(0))))

    @pl.when(~copies)
    def _compute() -> None:
        plgpu.set_max_registers(compute_registers, action="increase")
        turns: Any = _NoTurns()
        if config.turns:
            turns = _RoundTurns(turn_barriers, team * config.warpgroups, wg, config.warpgroups)
        weights = _Weights(scale, spec.soft_cap)

        def first_of(lap: jax.Array) -> jax.Array:
            return tiles_ref[row_of(lap), 0]

        def seen_by(first: jax.Array) -> tuple[jax.Array, ...]:
            """First and end of the keys that each row of a tile sees."""
            rows = pl.ds(_aligned(first) + wg * TILE_ROWS, TILE_ROWS)
            vector = plgpu.Layout.WGMMA.reduce(1)
            return tuple(load_whole(ranges_ref.at[i, rows], vector, optimized=False) for i in range(2))

        def process(lap: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            step, item, part, (low, high), next_first = carry
            # Loads for the next item, one of them for the one after it: none is waited for.
            following, later_first, seen_next = (read(lap + 1), read_part(lap + 1)), first_of(lap + 2), seen_by(next_first)
            q_slot = team * 2 + lax.rem(lap, jnp.int32(2))
            queries = q_smem.at[q_slot, wg]
            if config.turns and config.joint:  # both take all turns
                part = part._replace(begin=jnp.int32(0), end=item.blocks)

            def pass_by(i: jax.Array) -> None:
                slot = ring.slot(step + i)
                if config.chained:
                    turns.wait()
                    turns.hand_over()
                for full, free in ((ring.k_full, ring.k_free), (ring.v_full, ring.v_free)):
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.barrier_arrive(free.at[slot])

            def mask_of(i: jax.Array) -> Columns:
                whole = (i >= part.whole_begin) & (i < part.whole_end)
                first_key = item.key + i * block
                return lambda scores: mask_unless(whole, scores, low - first_key, high - first_key)

            def tokens_of(i: jax.Array) -> jax.Array:
                return real_tokens - (item.key + i * block)

            def attend(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                acc, top, total = state
                slot = ring.slot(step + i)
                plgpu.barrier_wait(ring.k_full.at[slot])

                def multiply(acc_ref: Any) -> jax.Array:
                    plgpu.wgmma(acc_ref, queries, ring.k.at[slot].transpose((1, 0)))
                    return acc_ref[...]

                scores = pl.run_scoped(multiply, plgpu.ACC((TILE_ROWS, block), jnp.float32))
                plgpu.barrier_arrive(ring.k_free.at[slot])
                top, total, narrow, rescale = weights.weigh(scores, top, total, mask_of(i), ring.v.dtype)
                acc = rescale_if_needed(acc, rescale)
                plgpu.barrier_wait(ring.v_full.at[slot])
                clear_rows_from(ring.v.at[slot], tokens_of(i))
                acc = pl.run_state(lambda ref: plgpu.wgmma(ref, narrow, ring.v.at[slot]))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(ring.v_free.at[slot])
                return acc, top, total

            def clear(i: jax.Array) -> None:
                slot = ring.slot(step + i)
                plgpu.barrier_wait(ring.v_full.at[slot])
                clear_rows_from(ring.v.at[slot], tokens_of(i))

            def chain_first(i: jax.Array) -> State:
                slot = ring.slot(step + i)
                plgpu.barrier_wait(ring.k_full.at[slot])
                turns.wait()

                def multiply(acc_ref: Any) -> jax.Array:
                    plgpu.wgmma(acc_ref, queries, ring.k.at[slot].transpose((1, 0)))
                    turns.hand_over()
                    return acc_ref[...]

                scores = pl.run_scoped(multiply, plgpu.ACC((TILE_ROWS, block), jnp.float32))
                plgpu.barrier_arrive(ring.k_free.at[slot])
                top, total, narrow, _ = weights.weigh(
                    scores, column(MASKED), tile(0, PARTS), mask_of(i), ring.v.dtype
                )
                clear(i)
                return tile(0, spec.head_dim), top, total, narrow

            def chain_next(i: jax.Array, state: State) -> State:
                slot, before = ring.slot(step + i), ring.slot(step + i - 1)
                acc, top, total, narrow = state
                plgpu.barrier_wait(ring.k_full.at[slot])
                turns.wait()

                def products(refs: Any) -> None:
                    acc_ref, result_ref = refs

                    def multiply(scores_ref: Any) -> jax.Array:
                        plgpu.wgmma(acc_ref, narrow, ring.v.at[before])
                        plgpu.wgmma(scores_ref, queries, ring.k.at[slot].transpose((1, 0)))
                        turns.hand_over()
                        return scores_ref[...]

                    result_ref[...] = pl.run_scoped(multiply, plgpu.ACC((TILE_ROWS, block), jnp.float32))

                acc, scores = pl.run_state(products)((plgpu.ACC.init(acc), tile(0, block)))
                plgpu.barrier_arrive(ring.v_free.at[before])
                plgpu.barrier_arrive(ring.k_free.at[slot])
                top, total, narrow, rescale = weights.weigh(scores, top, total, mask_of(i), ring.v.dtype)
                acc = rescale_if_needed(acc, rescale)
                clear(i)
                return acc, top, total, narrow

            def chain_last(i: jax.Array, state: State) -> tuple[jax.Array, ...]:
                slot = ring.slot(step + i)
                acc, top, total, narrow = state
                turns.wait()

                def products(acc_ref: Any) -> None:
                    plgpu.wgmma(acc_ref, narrow, ring.v.at[slot])
                    turns.hand_over()

                acc = pl.run_state(products)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(ring.v_free.at[slot])
                return acc, top, total.sum(axis=1)

            def attend_joint(i: jax.Array, state: State) -> State:
                state = next_block(queries, ring, turns, step + i, state, weights, mask_of(i))  # type: ignore[arg-type]
                clear_rows_from(ring.v.at[ring.slot(step + i)], tokens_of(i))
                return state

            plgpu.barrier_wait(q_full.at[q_slot])
            pl.loop(0, part.begin)(pass_by)

            @pl.when(part.begin < part.end)
            def _() -> None:
                if config.chained:
                    state = lax.fori_loop(part.begin + 1, part.end, chain_next, chain_first(part.begin))
                    acc, _, total = chain_last(part.end - 1, state)
                elif config.joint:
                    state = first_block(
                        queries,
                        ring,
                        turns,
                        step + part.begin,
                        weights,  # type: ignore[arg-type]
                        mask_of(part.begin),  # type: ignore[arg-type]
                        None,
                        tokens_of(part.begin),
                        spec.head_dim,
                    )
                    state = lax.fori_loop(part.begin + 1, part.end, attend_joint, state)
                    acc, _, total = last_values(ring, turns, step + part.end - 1, state)
                else:
                    start = (tile(0, spec.head_dim), column(MASKED), tile(0, PARTS))
                    acc, _, parts = lax.fori_loop(part.begin, part.end, attend, start)
                    total = parts.sum(axis=1)
                pl.loop(part.end, item.blocks)(pass_by)
                inverse = 1.0 / jnp.where(total == 0, 1.0, total)  # padding tokens see nothing
                acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
                token = _aligned(item.first) + wg * TILE_ROWS
                target = out_ref.at[pl.ds(token, TILE_ROWS), head_of(lap)]
                store_tile(queries, target, acc.astype(out_ref.dtype), item.first - token, item.last - token)

            if config.chained:

                @pl.when(part.begin >= part.end)
                def _() -> None:
                    turns.wait()
                    turns.hand_over()

            plgpu.barrier_arrive(q_free.at[q_slot])
            return step + item.blocks, *following, seen_next, later_first

        if config.turns:
            pl.when(wg == config.warpgroups - 1)(turns.hand_over)  # the first turn is the other's
        zero, one = jnp.int32(0), jnp.int32(1)
        first = read(zero)
        lax.fori_loop(
            0, laps, process, (zero, first, read_part(zero), seen_by(first.first), first_of(one))
        )


def _aligned(token: jax.Array) -> jax.Array:
    return lax.div(token, jnp.int32(GRANULE)) * GRANULE
