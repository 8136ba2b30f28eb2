"""What a warpgroup of the packed kernel for long sequences does with its 64 queries, in two forms.

`attend_freely`: scores, softmax and the product with V of one block after the other; several warpgroups, each at a pace
of its own, hide one another's waits. `attend_in_turns`: the product with V of one block and the scores of the next
leave together, in a turn at the tensor cores; for two warpgroups of wide heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.backends import TILE_ROWS
from pjengine.pallas_kernels.flash import Ring
from pjengine.pallas_kernels.flash_joint import SLACK, Turns, last_values
from pjengine.pallas_kernels.mosaic_common import MASKED, clear_rows_from, column, scaled_exp2, tile
from pjengine.pallas_kernels.packed.tiles import in_units, mask_unless
from pjengine.pallas_kernels.tile_softmax import PARTS, add_parts, rescale_if_needed

# accumulator [64, head_dim], running maximum [64] (log2), sums of weights [64, PARTS]
State = tuple[jax.Array, jax.Array, jax.Array]
Result = tuple[jax.Array, jax.Array]  # accumulator [64, head_dim], sum of weights [64]


@dataclasses.dataclass(frozen=True)
class Part:
    """64 queries of a tile, and the tile's blocks of keys in the ring. Blocks are counted from the tile's first.

    Attributes:
      queries: shared memory [64, head_dim].
      step: blocks that the ring brought before this tile's; key: first key of the tile's first block.
      low, high: int32 [64], first and end of the keys that each query sees.
      whole_begin, whole_end: the blocks that all queries see whole.
      real_tokens: from which token on all are padding, whose V may be NaN.
      scale, soft_cap: as in AttentionSpec.
    """

    queries: Any
    ring: Ring
    step: jax.Array
    key: jax.Array
    low: jax.Array
    high: jax.Array
    whole_begin: jax.Array
    whole_end: jax.Array
    real_tokens: jax.Array
    scale: float
    soft_cap: float | None

    def slot(self, i: jax.Array) -> jax.Array:
        return lax.rem(self.step + i, jnp.int32(self.ring.stages))

    def pass_over(self, begin: jax.Array, end: jax.Array, turns: Turns | None) -> None:
        """Gives back blocks that none of the queries sees."""

        @pl.loop(begin, end)
        def _(i: jax.Array) -> None:
            slot = self.slot(i)
            if turns is not None:
                turns.wait()
                turns.hand_over()
            for full, free in ((self.ring.k_full, self.ring.k_free), (self.ring.v_full, self.ring.v_free)):
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(free.at[slot])

    def attend_freely(self, begin: jax.Array, end: jax.Array) -> Result:
        """Attention to the blocks [begin, end)."""
        ring = self.ring

        def attend(i: jax.Array, state: State) -> State:
            acc, top, total = state
            slot = self.slot(i)
            plgpu.barrier_wait(ring.k_full.at[slot])

            def multiply(scores_ref: Any) -> jax.Array:
                plgpu.wgmma(scores_ref, self.queries, ring.k.at[slot].transpose((1, 0)))
                return scores_ref[...]

            scores = pl.run_scoped(multiply, self._scores())
            plgpu.barrier_arrive(ring.k_free.at[slot])
            top, total, weights, rescale = self._weigh(i, scores, top, total)
            acc = rescale_if_needed(acc, rescale)
            self._wait_for_values(i)
            acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, ring.v.at[slot]))(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(ring.v_free.at[slot])
            return acc, top, total

        start = (self._zeros(), column(MASKED), tile(0, PARTS))
        acc, _, total = lax.fori_loop(begin, end, attend, start)
        return acc, total.sum(axis=1)

    def attend_in_turns(self, begin: jax.Array, end: jax.Array, turns: Turns) -> Result:
        """Attention to the blocks [begin, end), at least one: in as many turns, and one more."""
        state = self._first(begin, turns)
        state = lax.fori_loop(begin + 1, end, lambda i, state: self._next(i, state, turns), state)
        return self._last(end - 1, state, turns)

    def _first(self, i: jax.Array, turns: Turns) -> tuple[State, jax.Array]:
        """The state after the scores of block i, and the weights of its values."""
        ring, slot = self.ring, self.slot(i)
        plgpu.barrier_wait(ring.k_full.at[slot])
        turns.wait()

        def multiply(scores_ref: Any) -> jax.Array:
            plgpu.wgmma(scores_ref, self.queries, ring.k.at[slot].transpose((1, 0)))
            turns.hand_over()
            return scores_ref[...]

        scores = pl.run_scoped(multiply, self._scores())
        plgpu.barrier_arrive(ring.k_free.at[slot])
        top, total, weights, _ = self._weigh(i, scores, column(MASKED), tile(0, PARTS))
        self._wait_for_values(i)
        return (self._zeros(), top, total), weights

    def _next(self, i: jax.Array, carry: tuple[State, jax.Array], turns: Turns) -> tuple[State, jax.Array]:
        """The product with V of the block before i, and the scores of block i."""
        ring, slot, before = self.ring, self.slot(i), self.slot(i - 1)
        (acc, top, total), weights = carry
        plgpu.barrier_wait(ring.k_full.at[slot])
        turns.wait()

        def products(refs: tuple[Any, Any]) -> None:
            acc_ref, result_ref = refs

            def multiply(scores_ref: Any) -> jax.Array:
                plgpu.wgmma(acc_ref, weights, ring.v.at[before])
                plgpu.wgmma(scores_ref, self.queries, ring.k.at[slot].transpose((1, 0)))
                turns.hand_over()
                return scores_ref[...]

            result_ref[...] = pl.run_scoped(multiply, self._scores())

        acc, scores = pl.run_state(products)((plgpu.ACC.init(acc), tile(0, ring.k.shape[1])))
        plgpu.barrier_arrive(ring.v_free.at[before])
        plgpu.barrier_arrive(ring.k_free.at[slot])
        top, total, weights, rescale = self._weigh(i, scores, top, total)
        acc = rescale_if_needed(acc, rescale)
        self._wait_for_values(i)
        return (acc, top, total), weights

    def _last(self, i: jax.Array, carry: tuple[State, jax.Array], turns: Turns) -> Result:
        """The product with V of block i."""
        (acc, top, total), weights = carry
        acc, _, total = last_values(self.ring, turns, self.step + i, (acc, top, total, weights))
        return acc, total

    def _weigh(
        self, i: jax.Array, scores: jax.Array, top: jax.Array, total: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """One step of the online softmax over the raw scores of block i.

        Returns: maximum, sums, weights in V's dtype, and what the accumulator is to be multiplied by, [64].
        """
        scores, factor = in_units(scores, self.scale, self.soft_cap)
        whole = (i >= self.whole_begin) & (i < self.whole_end)
        first_key = self.key + i * self.ring.k.shape[1]
        scores = mask_unless(whole, scores, self.low - first_key, self.high - first_key)
        block_top = scores.max(axis=1) * factor
        new_top = jnp.where(block_top > top + SLACK, block_top, top)
        rescale = jnp.exp2(top - new_top)
        weights = scaled_exp2(scores, factor, new_top, 0)
        total = add_parts(total * lax.broadcast_in_dim(rescale, total.shape, [0]), weights)
        # Before the branch of the rescaling: the conversion then passes behind the exponentials.
        total, narrow = lax.optimization_barrier((total, weights.astype(self.ring.v.dtype)))
        return new_top, total, narrow, rescale

    def _wait_for_values(self, i: jax.Array) -> None:
        slot = self.slot(i)
        plgpu.barrier_wait(self.ring.v_full.at[slot])
        # All warpgroups clear, each before it reads: they write equal bytes.
        clear_rows_from(self.ring.v.at[slot], self.real_tokens - (self.key + i * self.ring.k.shape[1]))

    def _scores(self) -> Any:
        return plgpu.ACC((TILE_ROWS, self.ring.k.shape[1]), jnp.float32)

    def _zeros(self) -> jax.Array:
        return tile(0, self.queries.shape[1])
