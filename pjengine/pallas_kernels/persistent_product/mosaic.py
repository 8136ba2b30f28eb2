"""A persistent product on Hopper, in Pallas Mosaic GPU, for kernels that do more with its sums than write them.

Per SM a warpgroup copies tiles of x and of the weights to a ring in shared memory, and one or two warpgroups multiply
64 rows each by the same two blocks of 128 columns, which may lie anywhere. The SMs of a cluster compute tiles below
each other and share the weights' tiles, or, where one row of tiles holds all tokens, tiles beside each other that share
x: each SM copies a half of what they share for both.
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

from pjengine.pallas_kernels.backends import TILE_ROWS
from pjengine.pallas_kernels.mosaic_common import launch, tile, tiled_smem
from pjengine.pallas_kernels.persistent_product.products import add_product, finish_products, weights_scratch
from pjengine.pallas_kernels.persistent_product.tiles import COLUMNS, K_STEP, ProductConfig, tiling_of

Columns = tuple[jax.Array, jax.Array]  # the first column of each of a tile's two blocks


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a warpgroup's sums belong.

    Attributes:
      row: first row of the tile, of which warpgroup `wg` has those from wg * TILE_ROWS on; columns: of the tile.
    """

    wg: jax.Array
    row: jax.Array
    columns: Columns

    @property
    def own_row(self) -> jax.Array:
        """First row of the warpgroup's sums."""
        return self.row + self.wg * TILE_ROWS


def launch_product(
    body: Any,
    x: jax.Array,
    weight: jax.Array,
    others: tuple[Any, ...],
    *,
    config: ProductConfig,
    out_type: tuple[Any, ...],
    name: str,
) -> Any:
    """Runs a kernel that calls `multiply_tiles`.

    Args:
      body: called with a reference per operand (x, weight, others) and per output, and the scratch by name: out_smem
        [warpgroups, 64, COLUMNS] in x's dtype, and what `multiply_tiles` takes as `scratch`.
    """
    stages = config.stages
    barrier = functools.partial(plgpu.Barrier, num_barriers=stages)
    shared_barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("place",), num_barriers=stages)
    scratch = dict(
        x_smem=tiled_smem((stages, config.rows, K_STEP), x.dtype),
        weights_smem=weights_scratch(stages, COLUMNS, x.dtype),
        out_smem=tiled_smem((config.warpgroups, TILE_ROWS, COLUMNS), x.dtype),
        full=barrier(num_arrivals=3),
        free=(shared_barrier if config.cluster > 1 else barrier)(num_arrivals=config.warpgroups),
    )
    return launch(
        body,
        (x, weight, *others),
        out_type=out_type,
        scratch=scratch,
        grid={"worker": config.sms // config.cluster},
        cluster={"place": config.cluster} if config.cluster > 1 else None,
        warpgroups=config.warpgroups + 1,
        name=name,
    )


def multiply_tiles(
    x_ref: Any,
    weight_ref: Any,
    *,
    blocks: int,
    columns: Callable[[jax.Array], Columns],
    epilogue: Callable[[jax.Array, Any, Place], None],
    load: Callable[[Place], Any] = lambda place: None,
    config: ProductConfig,
    x_smem: Any,
    weights_smem: Any,
    full: Any,
    free: Any,
) -> None:
    """x @ weight, tile by tile; what TMA copies reach beyond their arrays is 0.

    Args:
      x_ref: [T, hidden], T a multiple of 8, hidden of K_STEP; weight_ref: [hidden, n].
      blocks: how many tiles stand beside each other; columns: of each.
      epilogue: what a warpgroup does with its sums [64, 2 * COLUMNS], given what `load` returned.
      load: what it may fetch while the last products of a tile run.
    """
    tiling = tiling_of(x_ref.shape[0], blocks, config)
    wg, worker = lax.axis_index("wg"), lax.axis_index("worker")
    stages, k_steps = config.stages, x_ref.shape[1] // K_STEP
    place, cluster = (lax.axis_index("place"), "place") if config.cluster > 1 else (jnp.int32(0), None)
    x_sharers, weights_sharers = (cluster, None) if config.beside else (None, cluster)
    rounds = lax.div(tiling.rows * tiling.columns - worker + (tiling.workers - 1), jnp.int32(tiling.workers))

    def origin(lap: jax.Array) -> tuple[jax.Array, Columns]:
        """First row and columns of this SM's tile."""
        row, column = tiling.place(lap * tiling.workers + worker)
        if config.beside:
            column = column * config.cluster + place
        else:
            row = row * config.cluster + place
        return row * config.rows, columns(column)

    @pl.when(wg == config.warpgroups)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def fill_tile(lap: jax.Array, start: jax.Array) -> jax.Array:
            row, columns = origin(lap)

            def fill(k: jax.Array, step: jax.Array) -> jax.Array:
                slot = lax.rem(step, jnp.int32(stages))
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                inner = pl.ds(k * K_STEP, K_STEP)
                rows = x_ref.at[pl.ds(row, config.rows), inner]
                plgpu.copy_gmem_to_smem(rows, x_smem.at[slot], full.at[slot], collective_axes=x_sharers)
                for half, first in enumerate(columns):
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

        def multiply(start: jax.Array, load: Callable[[], Any]) -> tuple[jax.Array, Any]:
            """Sums [64, 2 * COLUMNS] over all k-steps, of which `start` is the first, and what was loaded meanwhile."""

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
            loaded = load()
            sums = finish_products(sums)
            plgpu.barrier_arrive(free.at[last])
            return sums, loaded

        @pl.loop(0, rounds)
        def _(lap: jax.Array) -> None:
            own = Place(wg, *origin(lap))
            sums, loaded = multiply(lap * k_steps, lambda: load(own))
            epilogue(sums, loaded, own)

        plgpu.wait_smem_to_gmem(0, wait_read_only=False)
