"""The inner step of the prefill kernel: the product with V of one block and the scores of the next leave together.

Two warpgroups take turns at the tensor cores (FlashAttention-3, Shah et al. 2024, arXiv:2407.08608). A turn issues both
products back to back, so that the tensor cores never wait for a warpgroup to notice that a product has ended; the
softmax of one warpgroup passes behind the turn of the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.backends import TILE_ROWS
from pjengine.pallas_kernels.flash import Ring
from pjengine.pallas_kernels.masking import cap_scores
from pjengine.pallas_kernels.mosaic_common import LOG2E, MASKED, clear_rows_from, column, scaled_exp2, tile
from pjengine.pallas_kernels.tile_softmax import PARTS, add_parts, rescale_if_needed, widen_with_zeros

# accumulator [64, head_dim], running maximum [64] (log2), sums of weights [64, PARTS], weights [64, block] of the block
# whose product with V is still to come
State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
SLACK = 8.0  # powers of two by which a maximum may lag behind before the accumulator is rescaled; costs no precision
Mask = Callable[[tuple[int, ...]], jax.Array]


@dataclasses.dataclass(frozen=True)
class Turns:
    """The order at the tensor cores: a barrier per warpgroup, at which the other one arrives when it has issued."""

    barriers: Any
    wg: jax.Array

    def wait(self) -> None:
        plgpu.barrier_wait(self.barriers.at[self.wg])

    def hand_over(self) -> None:
        plgpu.barrier_arrive(self.barriers.at[1 - self.wg])


@dataclasses.dataclass(frozen=True)
class Scores:
    """How scores become weights.

    Attributes:
      scale: positive; soft_cap: of the scaled scores, as in AttentionSpec.
    """

    scale: float | jax.Array
    soft_cap: float | None

    def weigh(
        self, qk: jax.Array, top: jax.Array, total: jax.Array, mask: Mask | None, dtype: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """One step of the online softmax over raw scores [64, block]; mask: called with their shape, True is seen.

        Returns: maximum, sums, weights, and what the accumulator is to be multiplied by, [64].
        """
        factor: Any = self.scale * LOG2E
        if self.soft_cap is not None:
            qk, factor = cap_scores(qk * self.scale, self.soft_cap), LOG2E
        if mask is not None:
            qk = jnp.where(mask(qk.shape), qk, -jnp.inf)
        block_top = qk.max(axis=1) * factor
        new_top = jnp.where(block_top > top + SLACK, block_top, top)
        rescale = jnp.exp2(top - new_top)
        weights = scaled_exp2(qk, factor, new_top, 0)
        total = add_parts(total * lax.broadcast_in_dim(rescale, total.shape, [0]), weights)
        # Before the branch: the conversion then passes behind the exponentials.
        total, narrow = lax.optimization_barrier((total, weights.astype(dtype)))
        return new_top, total, narrow, rescale


def first_block(
    q: Any,
    ring: Ring,
    turns: Turns,
    step: jax.Array,
    scores: Scores,
    mask: Mask,
    half: jax.Array | None,
    tokens: jax.Array,
    head_dim: int,
) -> State:
    """Scores and weights of a tile's first block, and its V made ready.

    Args:
      q: shared memory [64, head_dim]; step: number of the block since the kernel began.
      half: no query sees the second half of the block, or None: unknown.
      tokens: how many leading tokens of the block exist; what stands in the others may be NaN.
    """
    slot = lax.rem(step, jnp.int32(ring.stages))
    block = ring.k.shape[1]
    plgpu.barrier_wait(ring.k_full.at[slot])
    turns.wait()

    def attend(keys: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        def products(acc_ref: Any) -> jax.Array:
            plgpu.wgmma(acc_ref, q, ring.k.at[slot, pl.ds(0, keys)].transpose((1, 0)))
            turns.hand_over()
            return acc_ref[...]

        qk = pl.run_scoped(products, plgpu.ACC((TILE_ROWS, keys), jnp.float32))
        plgpu.barrier_arrive(ring.k_free.at[slot])
        top, total, weights, _ = scores.weigh(qk, column(MASKED), tile(0, PARTS), mask, ring.v.dtype)
        return top, total, widen_with_zeros(weights, block)

    if half is None:
        top, total, weights = attend(block)
    else:
        top, total, weights = lax.cond(half, lambda: attend(block // 2), lambda: attend(block))
    plgpu.barrier_wait(ring.v_full.at[slot])
    # Both warpgroups clear, each before it reads: they write equal bytes.
    clear_rows_from(ring.v.at[slot], tokens)
    return tile(0, head_dim), top, total, weights


def next_block(
    q: Any, ring: Ring, turns: Turns, step: jax.Array, state: State, scores: Scores, mask: Mask | None
) -> State:
    """The product with V of the block before `step`; scores and weights of block `step`.

    The scores' product is issued first, and the softmax passes behind the product with V too. The weights stay in
    float32 until that product has ended: the assembler serialises all products where it sees operands of the next one
    made while one runs. The wait for V stands where it does because the assembler moves the wait for a product upwards,
    but not past a loop.
    """
    slot, before = (lax.rem(x, jnp.int32(ring.stages)) for x in (step, step - 1))
    plgpu.barrier_wait(ring.k_full.at[slot])
    turns.wait()
    acc, top, total, weights = state

    def products(refs: tuple[Any, ...]) -> None:
        acc_ref, qk_ref, *result_refs = refs
        plgpu.wgmma(qk_ref, q, ring.k.at[slot].transpose((1, 0)))
        plgpu.wgmma(acc_ref, weights, ring.v.at[before])
        turns.hand_over()
        qk = plgpu.wgmma_accumulator_load(qk_ref, wait_n=1)
        plgpu.barrier_arrive(ring.k_free.at[slot])
        for ref, value in zip(result_refs, scores.weigh(qk, top, total, mask, jnp.float32), strict=True):
            ref[...] = value
        plgpu.barrier_wait(ring.v_full.at[slot])

    wide = tile(0, weights.shape[1])
    start = (plgpu.ACC.init(acc), plgpu.ACC.init(wide), top, total, wide, top)
    acc, _, top, total, wide, rescale = pl.run_state(products)(start)
    plgpu.barrier_arrive(ring.v_free.at[before])
    return rescale_if_needed(acc, rescale), top, total, wide.astype(weights.dtype)


def last_values(ring: Ring, turns: Turns, step: jax.Array, state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The product with V of a tile's last block, number `step`.

    Returns: accumulator [64, head_dim], maximum [64] (log2), sum of weights [64].
    """
    acc, top, total, weights = state
    slot = lax.rem(step, jnp.int32(ring.stages))
    turns.wait()

    def products(acc_ref: Any) -> None:
        plgpu.wgmma(acc_ref, weights, ring.v.at[slot])
        turns.hand_over()

    acc = pl.run_state(products)(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(ring.v_free.at[slot])
    return acc, top, total.sum(axis=1)
