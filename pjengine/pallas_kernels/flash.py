"""What the prefill kernel and the packed one for long sequences share: KV blocks in flight; the end of a softmax."""

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
from pjengine.pallas_kernels.mosaic_common import tiled_smem

COMPUTE_WARPGROUPS = 2
TILE = COMPUTE_WARPGROUPS * TILE_ROWS  # queries per work item

State = tuple[jax.Array, jax.Array, jax.Array]  # accumulator [64, head_dim], running maximum [64] (log2), sum [64]


@dataclasses.dataclass(frozen=True)
class Ring:
    """K and V blocks in flight: shared memory [stages, block, head_dim] each, and a barrier per stage.

    full: the copy has landed; free: every compute warpgroup is done with it.
    """

    k: Any
    v: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any

    @property
    def stages(self) -> int:
        return self.k.shape[0]

    def fill(self, step: jax.Array, copy: Callable[[str, Any, Any], None]) -> None:
        """Calls copy("k" or "v", shared memory, barrier) for block number `step` as soon as its place is free."""
        slot = lax.rem(step, jnp.int32(self.stages))
        for name, smem, full, free in (
            ("k", self.k, self.k_full, self.k_free),
            ("v", self.v, self.v_full, self.v_free),
        ):

            @pl.when(step >= self.stages)
            def _(free: Any = free) -> None:
                plgpu.barrier_wait(free.at[slot])

            copy(name, smem.at[slot], full.at[slot])


def ring_scratch(stages: int, block: int, head_dim: int, dtype: Any, copies: int) -> dict[str, Any]:
    """Scratch for a Ring; copies: arrivals that make a stage full."""

    def barrier(arrivals: int) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)

    return {
        "k": tiled_smem((stages, block, head_dim), dtype),
        "v": tiled_smem((stages, block, head_dim), dtype),
        "k_full": barrier(copies),
        "v_full": barrier(copies),
        "k_free": barrier(COMPUTE_WARPGROUPS),
        "v_free": barrier(COMPUTE_WARPGROUPS),
    }


def finish(state: State, sink: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The accumulator and what to divide it by, [64], never 0.

    Args:
      sink: float32 scalar, a log2 logit that joins the denominator.
    """
    acc, top, total = state
    if sink is not None:
        new_top = jnp.maximum(top, sink)
        rescale = jnp.exp2(top - new_top)
        acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])
        total = total * rescale + jnp.exp2(sink - new_top)
    return acc, jnp.where(total == 0, 1.0, total)  # a query that sees nothing
