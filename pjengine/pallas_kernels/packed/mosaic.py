"""Packed attention on Hopper: FlashAttention over a packed batch without padding, in Pallas Mosaic GPU.

A work item is a tile of 128 consecutive tokens of one head, whatever sequences they belong to. It reads the keys from
its first token's sequence to its last token's; what a token sees of them is a range, so that short sequences cost one
masked block and long ones run unmasked between their borders. The grid is persistent.
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

from pjengine.pallas_kernels.backends import current_target
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
from pjengine.pallas_kernels.mosaic_common import (
    HOPPER_SMS,
    TILE_ROWS,
    launch,
    load_whole,
    store_rows,
    tile_iota,
    tiled_smem,
)
from pjengine.pallas_kernels.specs import AttentionSpec

SHARED_BYTES_FOR_RING = 128 * 1024


@dataclasses.dataclass(frozen=True)
class PackedConfig:
    """Tuning of the kernel: KV tokens per step, blocks in flight, streaming multiprocessors of the device."""

    block: int
    stages: int
    sms: int


def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_starts: jax.Array,
    sinks: jax.Array | None,
    *,
    spec: AttentionSpec,
    scale: float,
) -> jax.Array:
    """See `pjengine.pallas_kernels.packed_attention`."""
    tokens = q.shape[0]
    config = packed_config(spec, tokens // max(1, query_starts.shape[0] - 1))
    ranges, plan = packed_plan(query_starts, tokens, spec, config)
    return _packed(q, k, v, ranges, plan, query_starts[-1:], spec=spec, scale=scale, config=config)


def packed_config(spec: AttentionSpec, mean_length: int) -> PackedConfig:
    """Small blocks where sequences are short: what a block brings beyond a sequence is wasted."""
    block = 64 if mean_length < 128 else 128
    stage = 2 * block * spec.head_dim * jnp.dtype(spec.kv_dtype).itemsize
    return PackedConfig(block, min(8, SHARED_BYTES_FOR_RING // stage), current_target().cores or HOPPER_SMS)


def packed_plan(
    query_starts: jax.Array, tokens: int, spec: AttentionSpec, config: PackedConfig
) -> tuple[jax.Array, jax.Array]:
    """What each token sees and what each tile reads; equal for all layers of a step, so XLA computes it once.

    Returns:
      ranges: int32 [2, tiles * 128], first and end of the keys each token sees; 0 and 0 for padding;
      plan: int32 [tiles, 4]: first key to read (a multiple of 8), blocks to read, and of those the first and end of the
        blocks that every token of the tile sees whole.
    """
    tiles = pl.cdiv(tokens, TILE)
    token = jnp.arange(tiles * TILE, dtype=jnp.int32)
    row = jnp.searchsorted(query_starts[1:], token, side="right")
    real = token < query_starts[-1]
    begin = jnp.where(real, query_starts[jnp.minimum(row, query_starts.shape[0] - 1)], 0)
    end = jnp.where(real, query_starts[jnp.minimum(row + 1, query_starts.shape[0] - 1)], 0)
    if spec.window is not None:
        begin = jnp.where(real, jnp.maximum(begin, token - spec.window + 1), 0)
        end = jnp.minimum(end, token + spec.window)
    if spec.causal:
        end = jnp.minimum(end, token + 1)
    lowest = jnp.where(real, begin, tokens).reshape(tiles, TILE).min(1) // 8 * 8
    highest = end.reshape(tiles, TILE).max(1)
    blocks = jnp.where(highest > 0, -(-(highest - lowest) // config.block), 0)
    # Padding tokens see nothing, so a tile that holds one has no block that all see whole.
    whole_begin = -(-(begin.reshape(tiles, TILE).max(1) - lowest) // config.block)
    whole_end = (end.reshape(tiles, TILE).min(1) - lowest) // config.block
    whole_begin = jnp.clip(whole_begin, 0, blocks)
    plan = jnp.stack([lowest, blocks, whole_begin, jnp.clip(whole_end, whole_begin, blocks)], axis=1)
    return jnp.stack([begin, end]).astype(jnp.int32), plan.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("spec", "scale", "config"))
def _packed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ranges: jax.Array,
    plan: jax.Array,
    real_tokens: jax.Array,
    *,
    spec: AttentionSpec,
    scale: float,
    config: PackedConfig,
) -> jax.Array:
    padding = ((0, -q.shape[0] % 8), (0, 0), (0, 0))  # TMA wants whole tiles of 8 rows
    (out,) = launch(
        functools.partial(_packed_kernel, spec=spec, scale=scale, config=config),
        (*(jnp.pad(x, padding) for x in (q, k, v)), ranges, plan, real_tokens),
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        scratch=dict(
            q_smem=tiled_smem((2, COMPUTE_WARPGROUPS, TILE_ROWS, spec.head_dim), q.dtype),
            q_full=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=2),
            q_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=2),
            turns=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            **ring_scratch(config.stages, config.block, spec.head_dim, k.dtype, copies=1),
        ),
        grid={"sm": config.sms},
        warpgroups=COMPUTE_WARPGROUPS + 1,
        name="packed_attention",
    )
    return out


@dataclasses.dataclass(frozen=True)
class _Item:
    """One work item inside the kernel: a tile of one head. All are int32 scalars.

    Attributes:
      lap: how many items this SM had before; step: KV blocks it had before.
      tile, head: which tile of tokens, which query head.
      key: first key to read; blocks: how many; whole_begin, whole_end: those that every token sees whole.
    """

    lap: jax.Array
    step: jax.Array
    tile: jax.Array
    head: jax.Array
    key: jax.Array
    blocks: jax.Array
    whole_begin: jax.Array
    whole_end: jax.Array


def _packed_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    ranges_ref: Any,
    plan_ref: Any,
    real_tokens_ref: Any,
    out_ref: Any,
    *,
    q_smem: Any,
    q_full: Any,
    q_free: Any,
    turns: Any,
    spec: AttentionSpec,
    scale: float,
    config: PackedConfig,
    **ring_refs: Any,
) -> None:
    wg, sm = lax.axis_index("wg"), lax.axis_index("sm")
    ring = Ring(**ring_refs)
    items = plan_ref.shape[0] * spec.heads

    def for_each_item(body: Callable[[_Item], None]) -> None:
        """Calls body for every work item of this SM, in the same order in every warpgroup."""

        def one(lap: jax.Array, step: jax.Array) -> jax.Array:
            place = sm + lap * config.sms
            tile, head = lax.div(place, jnp.int32(spec.heads)), lax.rem(place, jnp.int32(spec.heads))
            key, blocks, whole_begin, whole_end = (plan_ref[tile, i] for i in range(4))
            body(_Item(lap, step, tile, head, key, blocks, whole_begin, whole_end))
            return step + blocks

        laps = lax.div(items - sm + (config.sms - 1), jnp.int32(config.sms))
        lax.fori_loop(0, laps, one, jnp.int32(0))

    @pl.when(wg == COMPUTE_WARPGROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def process(item: _Item) -> None:
            q_slot = lax.rem(item.lap, jnp.int32(2))

            @pl.when(item.lap >= 2)
            def _() -> None:
                plgpu.barrier_wait(q_free.at[q_slot])

            for i in range(COMPUTE_WARPGROUPS):
                source = q_ref.at[pl.ds(item.tile * TILE + i * TILE_ROWS, TILE_ROWS), item.head]
                plgpu.copy_gmem_to_smem(source, q_smem.at[q_slot, i], q_full.at[q_slot])
            kv_head = lax.div(item.head, jnp.int32(spec.group))

            @pl.loop(0, item.blocks)
            def _(i: jax.Array) -> None:
                rows = pl.ds(item.key + i * config.block, config.block)

                def copy(name: str, smem: Any, barrier: Any) -> None:
                    plgpu.copy_gmem_to_smem((k_ref if name == "k" else v_ref).at[rows, kv_head], smem, barrier)

                ring.fill(item.step + i, copy)

        for_each_item(process)

    @pl.when(wg < COMPUTE_WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")

        def process(item: _Item) -> None:
            q_slot = lax.rem(item.lap, jnp.int32(2))
            token = item.tile * TILE + wg * TILE_ROWS
            vector = plgpu.Layout.WGMMA.reduce(1)
            begin, end = (
                load_whole(ranges_ref.at[i, pl.ds(token, TILE_ROWS)], vector, optimized=False) for i in range(2)
            )
            plgpu.barrier_wait(q_full.at[q_slot])

            def attend(i: jax.Array, state: State, masked: bool) -> State:
                first_key = item.key + i * config.block

                def mask(shape: tuple[int, ...]) -> jax.Array:
                    key = first_key + tile_iota((shape[0], shape[1]), 1)
                    above = key >= lax.broadcast_in_dim(begin, shape, [0])
                    return above & (key < lax.broadcast_in_dim(end, shape, [0]))

                return attend_block(
                    q_smem.at[q_slot, wg],
                    ring,
                    turns,
                    item.step + i,
                    state,
                    scale=scale,
                    soft_cap=spec.soft_cap,
                    mask=mask if masked else None,
                    tokens=real_tokens_ref[0] - first_key if masked else None,
                )

            state = initial_state(spec.head_dim)
            masked, whole = functools.partial(attend, masked=True), functools.partial(attend, masked=False)
            state = lax.fori_loop(0, item.whole_begin, masked, state)
            state = lax.fori_loop(item.whole_begin, item.whole_end, whole, state)
            acc, _, total = lax.fori_loop(item.whole_end, item.blocks, masked, state)
            plgpu.barrier_arrive(q_free.at[q_slot])
            total = jnp.where(total == 0, 1.0, total)  # padding tokens see nothing
            acc = acc / lax.broadcast_in_dim(total, acc.shape, [0])
            target = out_ref.at[pl.ds(token, TILE_ROWS), item.head]
            store_rows(target, acc.astype(out_ref.dtype), jnp.int32(0), out_ref.shape[0] - token)

        pl.when(wg == 1)(functools.partial(take_turn, turns))
        for_each_item(process)
        pl.when(wg == 0)(functools.partial(take_turn, turns))
