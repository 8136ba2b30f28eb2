"""Gate and up projections with SwiGLU on Hopper, in Pallas Mosaic GPU: the activation happens in registers.

A persistent product: per SM a warpgroup copies tiles of x and of both projections' weights to a ring in shared memory,
and one or two warpgroups multiply 64 rows each by the same 128 columns of gate and up. So a thread holds gate and up of
one place, and what leaves is the activation, half the columns, copied out behind the next tile's products. The SMs of a
cluster compute tiles below each other and share the weights' tiles, or, where one row of tiles holds all tokens, tiles
beside each other that share x: each SM copies a half of what they share for both.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.backends import TILE_ROWS
from pjengine.pallas_kernels.gated_mlp.products import add_product, finish_products, swiglu_halves, weights_scratch
from pjengine.pallas_kernels.gated_mlp.tiles import COLUMNS, GatedConfig, Tiling, tiling_of
from pjengine.pallas_kernels.mosaic_common import launch, tile, tiled_smem

K_STEP = 64


@functools.partial(jax.jit, static_argnames="config")
def gated_product(x: jax.Array, weight: jax.Array, *, config: GatedConfig) -> jax.Array:
    """silu(x @ gate) * (x @ up); sums and activation are float32.

    Args:
      x: [T, hidden], bfloat16 or float16, T a multiple of 8, hidden of K_STEP.
      weight: [hidden, 2 * mlp] in x's dtype, gate and up side by side, mlp a multiple of COLUMNS.
    Returns: [T, mlp] in x's dtype.
    """
    stages, mlp = config.stages, weight.shape[1] // 2
    tiling = tiling_of(x.shape[0], mlp, config)
    barrier = functools.partial(plgpu.Barrier, num_barriers=stages)
    shared_barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("place",), num_barriers=stages)
    (out,) = launch(
        functools.partial(_kernel, tiling=tiling, config=config),
        (x, weight),
        out_type=(jax.ShapeDtypeStruct((x.shape[0], mlp), x.dtype),),
        scratch=dict(
            x_smem=tiled_smem((stages, config.rows, K_STEP), x.dtype),
            weights_smem=weights_scratch(stages, COLUMNS, x.dtype),
            out_smem=tiled_smem((config.warpgroups, TILE_ROWS, COLUMNS), x.dtype),
            full=barrier(num_arrivals=3),
            free=(shared_barrier if config.cluster > 1 else barrier)(num_arrivals=config.warpgroups),
        ),
        grid={"worker": tiling.workers},
        cluster={"place": config.cluster} if config.cluster > 1 else None,
        warpgroups=config.warpgroups + 1,
        name="gated_product",
    )
    return out


def _kernel(
    x_ref: Any,
    weight_ref: Any,
    out_ref: Any,
    *,
    x_smem: Any,
    weights_smem: Any,
    out_smem: Any,
    full: Any,
    free: Any,
    tiling: Tiling,
    config: GatedConfig,
) -> None:
    wg, worker = lax.axis_index("wg"), lax.axis_index("worker")
    stages, k_steps, mlp = config.stages, x_ref.shape[1] // K_STEP, out_ref.shape[1]
    place, cluster = (lax.axis_index("place"), "place") if config.cluster > 1 else (jnp.int32(0), None)
    x_sharers, weights_sharers = (cluster, None) if config.beside else (None, cluster)
    rounds = lax.div(tiling.rows * tiling.columns - worker + (tiling.workers - 1), jnp.int32(tiling.workers))

    def origin(lap: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First row and column of this SM's tile."""
        row, column = tiling.place(lap * tiling.workers + worker)
        if config.beside:
            column = column * config.cluster + place
        else:
            row = row * config.cluster + place
        return row * config.rows, column * COLUMNS

    @pl.when(wg == config.warpgroups)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def fill_tile(lap: jax.Array, start: jax.Array) -> jax.Array:
            row, column = origin(lap)

            def fill(k: jax.Array, step: jax.Array) -> jax.Array:
                slot = lax.rem(step, jnp.int32(stages))
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                inner = pl.ds(k * K_STEP, K_STEP)
                rows = x_ref.at[pl.ds(row, config.rows), inner]
                plgpu.copy_gmem_to_smem(rows, x_smem.at[slot], full.at[slot], collective_axes=x_sharers)
                for half, first in enumerate((column, mlp + column)):
                    source = weight_ref.at[inner, pl.ds(first, COLUMNS)]
                    target = weights_smem.at[slot, half]
                    plgpu.copy_gmem_to_smem(source, target, full.at[slot], collective_axes=weights_sharers)
                return step + 1

            return lax.fori_loop(0, k_steps, fill, start)

        steps = lax.fori_loop(0, rounds, fill_tile, jnp.int32(0))

        # The other SM of the cluster arrives here to the end: until then this one must not leave.
        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step: jax.Array) -> None:
            plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(stages))])

    @pl.when(wg < config.warpgroups)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")

        def multiply(start: jax.Array) -> jax.Array:
            """Sums [64, 2 * 128] of gate and up over all k-steps, of which `start` is the first."""

            def issue(slot: jax.Array, sums: jax.Array) -> jax.Array:
                plgpu.barrier_wait(full.at[slot])
                return add_product(sums, x_smem.at[slot, pl.ds(wg * TILE_ROWS, TILE_ROWS)], weights_smem.at[slot])

            def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                before, sums = carry
                slot = jnp.where(before == stages - 1, 0, before + 1)
                sums = issue(slot, sums)
                plgpu.wgmma_wait(1)  # the product of the step before has ended
                plgpu.barrier_arrive(free.at[before])
                return slot, sums

            first = lax.rem(start, jnp.int32(stages))
            last, sums = lax.fori_loop(1, k_steps, step, (first, issue(first, tile(0, 2 * COLUMNS))))
            sums = finish_products(sums)
            plgpu.barrier_arrive(free.at[last])
            return sums

        @pl.loop(0, rounds)
        def _(lap: jax.Array) -> None:
            row, column = origin(lap)
            result = swiglu_halves(multiply(lap * k_steps)).astype(out_ref.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left
            out_smem[wg] = result
            plgpu.commit_smem()
            target = out_ref.at[pl.ds(row + wg * TILE_ROWS, TILE_ROWS), pl.ds(column, COLUMNS)]
            plgpu.copy_smem_to_gmem(out_smem.at[wg], target)

        plgpu.wait_smem_to_gmem(0, wait_read_only=False)
