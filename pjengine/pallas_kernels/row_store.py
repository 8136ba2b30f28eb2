"""Some rows of a tile from shared to global memory, 16 bytes a lane."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir.dialects import arith, llvm

from pjengine.pallas_kernels.mosaic_common import tile_swizzle, tile_transforms
from pjengine.pallas_kernels.registers import Int32, pointer, this_thread, tile_offset, words


def store_staged_rows(staged: Any, ref: Any, begin: jax.Array, end: jax.Array, row_stride: int) -> None:
    """Writes the rows [begin, end) of a tile in shared memory, committed before, to global memory.

    Args:
      staged: [rows, columns] in tiles of `tile_transforms`, 16-bit; rows * columns is a multiple of 1024.
      ref: GMEM reference [n, columns] whose rows are row_stride elements apart; row i of the tile goes to ref[i].
      begin, end: int32 scalars, end <= n.
    """
    rows, columns = staged.shape
    itemsize, swizzle = jnp.dtype(staged.dtype).itemsize, tile_swizzle(columns, staged.dtype)
    chunks = columns * itemsize // 16  # of a row
    splat = plgpu.Layout.WG_SPLAT
    arg_types = (plgpu.RefType(tile_transforms(columns, staged.dtype)), plgpu.RefType(), splat, splat)

    @plgpu.inline_mgpu(arg_types=arg_types)
    def store(ctx: Any, source: Any, target: Any, begin: Any, end: Any) -> None:
        low, high = (Int32(x.registers.item()) for x in (begin, end))
        places = [this_thread().index + first for first in range(0, rows * chunks, 128)]

        def load(x: Int32) -> Any:
            row = x // chunks
            offset = tile_offset(row // 8, row % 8, x % chunks * 16, columns * itemsize, swizzle)
            return llvm.load(words(4), pointer(source, offset))

        loaded = [load(x) for x in places]  # all before the first store: their latencies overlap
        for x, value in zip(places, loaded, strict=True):
            row = x // chunks
            above = arith.cmpi(arith.CmpIPredicate.sge, row.value, low.value)
            with mgpu_utils.when(arith.andi(above, row.below(high))):
                llvm.store(value, pointer(target, row * (row_stride * itemsize) + x % chunks * 16))

    store(staged, ref, begin, end)
