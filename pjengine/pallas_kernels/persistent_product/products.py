"""Products with two blocks of columns at once, in registers.

One wgmma takes two blocks of 128 columns, which two copies bring to shared memory: its operand's tiles of 64 columns
lie one behind the other. Pallas' own wgmma knows only tiles of 8 rows, in which no copy can bring half of the columns,
so the sums are plain values here, and nothing may read them before `finish_products`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

from pjengine.pallas_kernels.mosaic_common import tile_transforms

SWIZZLE = 128
TILE = 64  # rows and columns of the weights' tiles: 128 bytes
WEIGHTS_TRANSFORMS = (plgpu.TilingTransform((TILE, TILE)), plgpu.SwizzleTransform(SWIZZLE))
LAYOUT = plgpu.Layout.WGMMA


def weights_scratch(stages: int, columns: int, dtype: Any) -> Any:
    """Shared memory [stages, 2, 64, columns] for tiles of both blocks."""
    return plgpu.SMEM((stages, 2, TILE, columns), dtype, transforms=WEIGHTS_TRANSFORMS)


def add_product(sums: jax.Array, x: Any, weights: Any) -> jax.Array:
    """Begins sums [64, 2 * n] += x @ [first | second] and commits it.

    Args:
      x: shared memory [64, 64] in `tile_transforms`; weights: [2, 64, n] in WEIGHTS_TRANSFORMS, both blocks.
    """
    arg_types = (LAYOUT, plgpu.RefType(tile_transforms(TILE, x.dtype)), plgpu.RefType(WEIGHTS_TRANSFORMS))
    result = plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=arg_types, return_type=result)
    def issue(ctx: Any, sums: Any, x: Any, weights: Any) -> Any:
        # [2, 1, n / 64, 64, 64] to [1, 2 * n / 64, 64, 64]
        operand = mgpu_utils.memref_unsqueeze(mgpu_utils.memref_fold(weights, 0, 3), 0)
        nvvm.wgmma_fence_aligned()
        acc = mgpu.WGMMAAccumulator.from_registers(sums, sync=False)
        acc = mgpu.wgmma(acc, x, operand, swizzle=SWIZZLE)
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], "wgmma.commit_group.sync.aligned;", "", has_side_effects=True)
        return acc.value

    return issue(sums, x, weights)


def finish_products(sums: jax.Array) -> jax.Array:
    """Waits for all products; the sums may be read."""
    plgpu.wgmma_wait(0)

    @plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, layout=LAYOUT))
    def barrier(ctx: Any, sums: Any) -> Any:
        return fragmented_array.optimization_barrier(sums)

    return barrier(sums)
