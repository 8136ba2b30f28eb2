"""Per-thread pieces of the packed kernels: masks of ranges of keys, and stores of a tile's rows in 16-byte pieces."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from pjengine.pallas_kernels.masking import cap_scores
from pjengine.pallas_kernels.mosaic_common import LOG2E, tile_swizzle, tile_transforms
from pjengine.pallas_kernels.registers import Int32, assembly, int32, pointer, this_thread, tile_offset

WARP_ROWS = 16  # rows of a wgmma tile that one warp holds
CHUNK = 16  # bytes that a lane stores at once
GLOBAL = 1  # address space


def in_units(scores: jax.Array, scale: float, soft_cap: float | None) -> tuple[jax.Array, float]:
    """Scores and the positive factor that makes logits to base 2 of them: it joins the exponent's multiply-add."""
    if soft_cap is not None:
        return cap_scores(scores * scale, soft_cap), LOG2E
    return (scores, scale * LOG2E) if scale > 0 else (scores * scale, LOG2E)


def mask_unless(whole: jax.Array, scores: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """`mask_scores` where the scalar `whole` is false; where it is true, every row sees every column."""
    return lax.cond(whole, lambda x: x, lambda x: mask_scores(x, low, high), scores)


def mask_scores(scores: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """A tile of scores with -inf outside the columns [low, high) of each row.

    A lane's columns of a row become bits of a word: two comparisons per element would cost more than all else that
    happens to it.

    Args:
      scores: float32 [64, columns] in Layout.WGMMA, at most 128 columns.
      low, high: int32 [64] in Layout.WGMMA.reduce(1), low <= high; may lie outside the tile.
    """
    row = plgpu.Layout.WGMMA.reduce(1)
    result = plgpu.ShapeDtypeStruct(scores.shape, jnp.float32, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, row, row), return_type=result)
    def mask(ctx: Any, scores: Any, low: Any, high: Any) -> Any:
        shift = this_thread().pair * 2
        begins, ends = ([_columns_below(_scalar(x), shift) for x in rows.registers.flat] for rows in (low, high))
        words = [_bits(begin, end) for begin, end in zip(begins, ends, strict=True)]
        registers = np.empty_like(scores.registers)
        hidden = mgpu.c(float("-inf"), ir.F32Type.get())
        # A tile's registers in flat order: of each 8 columns a pair of this lane's first row and one of its second.
        for place, (index, register) in enumerate(np.ndenumerate(scores.registers)):
            word, pair = words[place % 2], place // 2
            for i in range(2):
                bit = Int32(word) & (1 << (2 * pair + i) if 2 * pair + i < 31 else -(1 << 31))
                seen = arith.cmpi(arith.CmpIPredicate.ne, bit.value, int32(0).value)
                value = vector.extract(register, dynamic_position=[], static_position=[i])
                register = vector.insert(
                    arith.select(seen, value, hidden), register, dynamic_position=[], static_position=[i]
                )
            registers[index] = register
        return mgpu.FragmentedArray(_registers=registers, _layout=scores.layout, _is_signed=None)

    return mask(scores, low, high)


def store_tile(smem: Any, ref: Any, values: jax.Array, begin: jax.Array, end: jax.Array) -> None:
    """Writes the rows [begin, end) of a wgmma tile to global memory, by way of shared memory: rows in whole sectors.

    Each warp moves its own 16 rows. What is in `smem` is lost; a copy to it may begin after the warpgroup's next
    barrier.

    Args:
      smem: [64, columns] in tiles, this warpgroup's own; no copy to it is under way.
      ref: GMEM reference [n, columns]; row i of the tile goes to ref[i]. Its rows begin at multiples of 16 bytes.
      values: [64, columns] in Layout.WGMMA, 16-bit elements.
      begin, end: int32 scalars, end <= n.
    """
    columns, dtype = values.shape[1], values.dtype
    row_bytes, swizzle = columns * dtype.itemsize, tile_swizzle(columns, dtype)
    splat = plgpu.Layout.WG_SPLAT
    arg_types = (plgpu.RefType(tile_transforms(columns, dtype)), plgpu.RefType(), plgpu.Layout.WGMMA, splat, splat)

    @plgpu.inline_mgpu(arg_types=arg_types)
    def store(ctx: Any, smem: Any, ref: Any, values: Any, begin: Any, end: Any) -> None:
        thread = this_thread()
        lane, first_row = thread.index % 32, thread.warp * WARP_ROWS

        def address(row: Int32, column: Int32) -> Int32:
            """Offset of a byte of the warp's row `row`."""
            return tile_offset(thread.warp * 2 + row // 8, row % 8, column, row_bytes, swizzle)

        words = [_word(register) for register in values.registers.flat]
        mgpu_utils.warpgroup_barrier()  # products that read `smem` are done in all warps
        # 8 lanes name the rows of each matrix of 8 by 8: those of rows 0 to 7 and 8 to 15, then of the next 8 columns.
        matrix = lane // 8
        for i in range(0, len(words), 4):
            offset = address((matrix % 2) * 8 + lane % 8, (matrix // 2) * CHUNK + i // 4 * 2 * CHUNK)
            _store_matrices(pointer(smem, offset), words[i : i + 4])
        mgpu_utils.warp_barrier()
        words_type = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
        chunks = row_bytes // CHUNK
        rows_at_once = 32 // chunks
        rows = [lane // chunks + i for i in range(0, WARP_ROWS, rows_at_once)]
        column = (lane % chunks) * CHUNK
        loaded = [llvm.load(words_type, pointer(smem, address(row, column))) for row in rows]
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)
        strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
        low, high = (Int32(x.registers.item()) for x in (begin, end))
        for row, chunk in zip(rows, loaded, strict=True):
            row = row + first_row
            inside = arith.andi(row.below(high), arith.cmpi(arith.CmpIPredicate.sge, row.value, low.value))
            with mgpu_utils.when(inside):
                place = pointer(ref, row * (strides[0] * dtype.itemsize) + column)
                llvm.store(chunk, llvm.addrspacecast(llvm.PointerType.get(GLOBAL), place))

    store(smem, ref, values, begin, end)


def _store_matrices(address: Any, words: list[Any]) -> None:
    """`stmatrix`: word i of each lane, two elements of a wgmma fragment, becomes part of matrix i's rows."""
    word = ir.IntegerType.get_signless(32)
    shared = llvm.ptrtoint(word, address)
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [shared, *words],
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};",
        "r,r,r,r,r,~{memory}",
        has_side_effects=True,
    )


def _scalar(register: Any) -> Any:
    if not isinstance(register.type, ir.VectorType):
        return register
    return vector.extract(register, dynamic_position=[], static_position=[0])


def _word(register: Any) -> Any:
    """A pair of 16-bit elements as one word."""
    word = ir.IntegerType.get_signless(32)
    return vector.extract(
        vector.bitcast(ir.VectorType.get((1,), word), register), dynamic_position=[], static_position=[0]
    )


def _columns_below(limit: Any, shift: Int32) -> Int32:
    """How many of a lane's columns lie below `limit`: it has 8 * i + shift and 8 * i + shift + 1 for each i."""
    zero = int32(0)
    reach = Int32(arith.maxsi(arith.subi(limit, shift.value), zero.value))
    return (reach >> 3) * 2 + (reach & 7).minimum(2)


def _bits(begin: Int32, end: Int32) -> Any:
    """A word whose bits [begin, end) are set, as far as it has them."""
    width = arith.subi(end.value, begin.value)
    return assembly("bmsk.clamp.b32 $0, $1, $2;", [begin.value, width])[0]
