"""Gate and up projections with SwiGLU on Hopper, in Pallas Mosaic GPU: one product, its activation in registers.

A persistent, warp-specialised product: a warpgroup copies tiles of x and of the gate's and the up projection's columns
to a ring in shared memory, two warpgroups multiply 64 rows each by 128 columns of both. So a thread holds gate and up
of the same place, and the result leaves as bfloat16, behind the next tile's products. Two SMs form a cluster and
share a tile of x or of the weights, each copying one half for both.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.gated_mlp.activation import swiglu_tile
from pjengine.pallas_kernels.gated_mlp.partials import fence_registers, add_partial, announce, await_partial, leave_partial
from pjengine.pallas_kernels.gated_mlp.schedule import Schedule, Segment, segment_of
from pjengine.pallas_kernels.mosaic_common import TILE_ROWS, compiler_params, tile, tiled_smem

WARPGROUPS = 2  # that multiply
ROWS = WARPGROUPS * TILE_ROWS  # of a tile
COLUMNS = 128  # of a tile, of gate and of up each
K_STEP = 64
CLUSTER = 2  # SMs that share copies


@dataclasses.dataclass(frozen=True)
class GatedConfig:
    """Tuning of the kernel.

    Attributes:
      sms: streaming multiprocessors of the device; stages: of the ring.
      shared: what the SMs of a cluster have in common, "weights" (rows differ) or "rows" (columns differ).
      group: rows of cluster tiles that are walked together.
      split: cut what is left over after the last whole round of tiles.
      method: of the activation.
      outputs: columns of the buffer that results leave from.
    """

    sms: int
    stages: int = 4
    shared: str = "weights"
    group: int = 8
    split: bool = True
    method: str = "plain"
    outputs: int = COLUMNS


def schedule_of(tokens: int, hidden: int, mlp: int, config: GatedConfig) -> Schedule:
    rows, columns = math.ceil(tokens / ROWS), mlp // COLUMNS
    if config.shared == "weights":
        rows = math.ceil(rows / CLUSTER)
    else:
        columns //= CLUSTER
    workers = config.sms // CLUSTER
    return Schedule(rows, columns, min(config.group, rows), hidden // K_STEP, workers, config.split)


@functools.partial(jax.jit, static_argnames="config")
def gated_product(x: jax.Array, weight: jax.Array, *, config: GatedConfig) -> jax.Array:
    """silu(x @ gate) * (x @ up), sums and activation in float32.

    Args:
      x: [T, hidden], T a multiple of 8; weight: [hidden, 2 * mlp], gate and up side by side; both bfloat16 or float16.
    Returns: [T, mlp] in x's dtype.
    """
    tokens, hidden = x.shape
    mlp = weight.shape[1] // 2
    schedule = schedule_of(tokens, hidden, mlp, config)
    sums = config.sms * WARPGROUPS * 2 if schedule.cut else 1
    flags = jnp.zeros(config.sms * WARPGROUPS, jnp.int32)
    out_type = (
        jax.ShapeDtypeStruct((tokens, mlp), x.dtype),
        jax.ShapeDtypeStruct((sums, TILE_ROWS * COLUMNS), jnp.float32),
    )
    stages, dtype = config.stages, x.dtype
    scratch = dict(
        x_smem=tiled_smem((stages, ROWS, K_STEP), dtype),
        gate_smem=tiled_smem((stages, K_STEP, COLUMNS), dtype),
        up_smem=tiled_smem((stages, K_STEP, COLUMNS), dtype),
        out_smem=tiled_smem((WARPGROUPS, TILE_ROWS, config.outputs), dtype),
        full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        free=plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=WARPGROUPS, num_barriers=stages),
    )

    def kernel(*refs: Any) -> None:
        body = functools.partial(_kernel, *refs, schedule=schedule, config=config)
        pl.run_scoped(body, collective_axes="wg", **scratch)

    mesh = plgpu.Mesh(
        grid=(config.sms // CLUSTER,),
        grid_names=("worker",),
        cluster=(CLUSTER,),
        cluster_names=("pair",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="gated_product",
    )
    call = pl.kernel(kernel, out_type=out_type, mesh=mesh, compiler_params=compiler_params(), name="gated_product")
    return call(x, weight, flags)[0]


def _kernel(
    x_ref: Any,
    weight_ref: Any,
    flags_ref: Any,
    out_ref: Any,
    sums_ref: Any,
    x_smem: Any,
    gate_smem: Any,
    up_smem: Any,
    out_smem: Any,
    full: Any,
    free: Any,
    *,
    schedule: Schedule,
    config: GatedConfig,
) -> None:
    wg, worker, place = lax.axis_index("wg"), lax.axis_index("worker"), lax.axis_index("pair")
    stages, mlp = config.stages, out_ref.shape[1]
    by_rows = config.shared == "weights"

    def origin(segment: Segment) -> tuple[Any, Any]:
        """First row and column of this SM's tile."""
        row = segment.row * CLUSTER + place if by_rows else segment.row
        column = segment.column if by_rows else segment.column * CLUSTER + place
        return row * ROWS, column * COLUMNS

    @pl.when(wg == WARPGROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def process(index: jax.Array, start: jax.Array) -> jax.Array:
            segment = segment_of(schedule, worker, index)
            row, column = origin(segment)

            def fill(k: jax.Array, step: jax.Array) -> jax.Array:
                slot = lax.rem(step, jnp.int32(stages))

                @pl.when(step >= stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                inner = pl.ds(k * K_STEP, K_STEP)
                weights = dict(collective_axes="pair") if by_rows else {}
                rows = {} if by_rows else dict(collective_axes="pair")
                plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, ROWS), inner], x_smem.at[slot], full.at[slot], **rows)
                for smem, first in ((gate_smem, column), (up_smem, mlp + column)):
                    source = weight_ref.at[inner, pl.ds(first, COLUMNS)]
                    plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot], **weights)
                return step + 1

            return lax.fori_loop(segment.begin, segment.end, fill, start)

        steps = lax.fori_loop(0, schedule.segments, process, jnp.int32(0))

        # The other SM of the cluster still arrives here: nobody leaves before.
        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step: jax.Array) -> None:
            plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(stages))])

    @pl.when(wg < WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        own = (worker * CLUSTER + place) * WARPGROUPS + wg

        def helper(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            slot = own + i * (CLUSTER * WARPGROUPS)
            await_partial(flags_ref, slot)
            return add_partial(sums_ref, slot * 2, sums[0]), add_partial(sums_ref, slot * 2 + 1, sums[1])

        def multiply(segment: Segment, start: jax.Array) -> tuple[jax.Array, jax.Array]:
            """float32 sums [64, 128] of gate and up over the segment's k-steps."""

            def issue(refs: tuple[Any, Any], slot: jax.Array) -> None:
                plgpu.barrier_wait(full.at[slot])
                fence_registers()
                rows = x_smem.at[slot, pl.ds(wg * TILE_ROWS, TILE_ROWS)]
                plgpu.wgmma(refs[0], rows, gate_smem.at[slot])
                plgpu.wgmma(refs[1], rows, up_smem.at[slot])

            def products(gate_ref: Any, up_ref: Any) -> tuple[jax.Array, jax.Array]:
                first = lax.rem(start, jnp.int32(stages))
                issue((gate_ref, up_ref), first)

                def body(i: jax.Array, before: jax.Array) -> jax.Array:
                    slot = jnp.where(before == stages - 1, 0, before + 1)
                    issue((gate_ref, up_ref), slot)
                    plgpu.wgmma_wait(2)
                    plgpu.barrier_arrive(free.at[before])
                    return slot

                last = lax.fori_loop(1, segment.end - segment.begin, body, first)
                if schedule.cut:
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[last])
                    return None
                sums = gate_ref[...], up_ref[...]
                plgpu.barrier_arrive(free.at[last])
                return sums

            if not schedule.cut:
                acc = plgpu.ACC((TILE_ROWS, COLUMNS), jnp.float32)
                return pl.run_scoped(products, acc, acc)
            zero = tile(0, COLUMNS)
            init = lax.fori_loop(1, segment.helpers + 1, helper, (zero, zero))
            return pl.run_state(lambda refs: products(*refs))(tuple(plgpu.ACC.init(x) for x in init))

        def store(segment: Segment, gate: jax.Array, up: jax.Array) -> None:
            row, column = origin(segment)
            result = swiglu_tile(gate, up, config.method).astype(out_ref.dtype)
            for part in range(COLUMNS // config.outputs):
                columns = slice(part * config.outputs, (part + 1) * config.outputs)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[wg] = result[:, columns]
                plgpu.commit_smem()
                target = out_ref.at[
                    pl.ds(row + wg * TILE_ROWS, TILE_ROWS), pl.ds(column + part * config.outputs, config.outputs)
                ]
                plgpu.copy_smem_to_gmem(out_smem.at[wg], target)

        def process(index: jax.Array, start: jax.Array) -> jax.Array:
            segment = segment_of(schedule, worker, index)

            @pl.when(segment.end > segment.begin)
            def _() -> None:
                sums = multiply(segment, start)
                if not schedule.cut:
                    store(segment, *sums)
                    return

                @pl.when(segment.owned == 1)
                def _() -> None:
                    store(segment, *sums)

                @pl.when(segment.owned == 0)
                def _() -> None:
                    for i, part in enumerate(sums):
                        leave_partial(sums_ref, own * 2 + i, part)
                    announce(flags_ref, own)

            return start + segment.end - segment.begin

        lax.fori_loop(0, schedule.segments, process, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=False)


