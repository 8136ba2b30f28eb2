"""float8 KV blocks become 16-bit ones between two buffers in shared memory."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir.dialects import llvm, vector

from pjengine.pallas_kernels.mosaic_common import tile_swizzle, tile_transforms
from pjengine.pallas_kernels.registers import (
    load_words,
    pointer,
    this_thread,
    tile_offset,
    widen_float8,
    widen_float8_to_bfloat16,
    words,
)


def widen_block(source: Any, target: Any) -> None:
    """target[...] = source[...] by one warpgroup: tiled float8_e4m3fn to tiled bfloat16 or float16, one shape.

    The caller commits the writes. rows * columns is a multiple of 2048.
    """
    rows, columns = source.shape
    arg_types = tuple(plgpu.RefType(tile_transforms(columns, x.dtype)) for x in (source, target))
    widen = widen_float8_to_bfloat16 if target.dtype == jnp.bfloat16 else widen_float8

    @plgpu.inline_mgpu(arg_types=arg_types)
    def copy(ctx: Any, source_ref: Any, target_ref: Any) -> None:
        narrow, wide = (tile_swizzle(columns, x.dtype) for x in (source, target))
        for first in range(0, rows * columns // 16, 128):
            unit = this_thread().index + first  # of 16 elements
            row, column = unit // (columns // 16), unit % (columns // 16)
            loaded = load_words(source_ref, tile_offset(row // 8, row % 8, column * 16, columns, narrow), 16)
            widened = [word for x in loaded for word in widen(x)]
            for i in range(2):
                place = tile_offset(row // 8, row % 8, column * 32 + 16 * i, columns * 2, wide)
                llvm.store(vector.from_elements(words(4), widened[4 * i : 4 * i + 4]), pointer(target_ref, place))

    copy(source, target)
