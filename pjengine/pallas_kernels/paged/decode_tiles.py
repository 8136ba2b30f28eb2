"""What the decode kernel does with single registers: queries, keys, values and weights between memory and wgmma.

The kernel works on transposed tiles: scores [tokens, columns] = K · queriesᵀ and results [rows, columns] = Vᵀ ·
weightsᵀ, where the columns are the query heads of one KV head, padded to a multiple of 8. K and V are the left
operands: from shared memory where wgmma can read them there, else from registers ("fragments"), which also widens
float8 to float16.

In fragments the order of the contracted or the result dimension is free, and chosen so that a lane reads neighbouring
bytes: `stage_queries` and `store_columns` follow the same orders.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pjengine.pallas_kernels.backends import TILE_ROWS
from pjengine.pallas_kernels.mosaic_common import tile_swizzle, tile_transforms
from pjengine.pallas_kernels.registers import (
    Int32,
    int32,
    interleave_halves,
    load_words,
    pointer,
    this_thread,
    tile_offset,
    widen_float8,
    zero_words,
)

COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # a [columns] vector: every lane holds the columns of its pair


def padded_rows(head_dim: int) -> int:
    """Rows of the transposed result: wgmma makes them in 64s."""
    return -(-head_dim // TILE_ROWS) * TILE_ROWS


def keys_from_shared(dtype: Any) -> bool:
    """Whether wgmma can read K in shared memory."""
    return jnp.dtype(dtype).itemsize == 2


def values_from_shared(dtype: Any, head_dim: int) -> bool:
    """Whether wgmma can read V, transposed, in shared memory."""
    return jnp.dtype(dtype).itemsize == 2 and head_dim % TILE_ROWS == 0


def stage_queries(queries: Any, smem: Any, *, permuted: bool) -> None:
    """Copies the queries of one KV head to shared memory, as wgmma's right operand. The caller commits the writes.

    Args:
      queries: GMEM reference [group, head_dim]; smem: tiled [columns, head_dim]; rows past the group repeat the last.
      permuted: in key_fragments' order of head_dim, not in the natural one.
    """
    columns, head_dim = smem.shape
    group = queries.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(tile_transforms(head_dim, smem.dtype))))
    def copy(ctx: Any, source: Any, target: Any) -> None:
        kind, swizzle = ir.MemRefType(target.type).element_type, tile_swizzle(head_dim, smem.dtype)
        source_kind = ir.MemRefType(source.type).element_type
        units = columns * head_dim // 16  # of 16 elements
        for first in range(0, units, 128):
            unit = this_thread().index + first
            with mgpu_utils.when(unit.below(units)):
                row, unit_column = unit // (head_dim // 16), unit % (head_dim // 16)
                offset = (row.minimum(group - 1) * head_dim + unit_column * 16) * 2
                elements = ir.VectorType.get((8,), source_kind)
                halves = [llvm.load(elements, pointer(source, offset + 16 * i)) for i in range(2)]
                if permuted:  # element 4 * pair + 2 * half + i goes to 8 * half + 2 * pair + i
                    halves = [
                        vector.shuffle(
                            halves[0], halves[1], [4 * pair + 2 * half + i for pair in range(4) for i in (0, 1)]
                        )
                        for half in range(2)
                    ]
                if kind != source_kind:
                    single = ir.VectorType.get((8,), ir.F32Type.get())
                    halves = [arith.truncf(ir.VectorType.get((8,), kind), arith.extf(single, x)) for x in halves]
                for i, half in enumerate(halves):
                    place = tile_offset(row // 8, row % 8, unit_column * 32 + 16 * i, head_dim * 2, swizzle)
                    llvm.store(half, pointer(target, place))

    copy(queries, smem)


def key_fragments(smem: Any) -> jax.Array:
    """float16 [tokens, head_dim] as wgmma's left operand, from float8 K in shared memory; head_dim permuted.

    In each 16 elements of head_dim, element 4 * pair + 2 * half + i stands at 8 * half + 2 * pair + i.
    """
    tokens, head_dim = smem.shape
    result = plgpu.ShapeDtypeStruct((tokens, head_dim), jnp.float16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(tile_transforms(head_dim, smem.dtype)),), return_type=result)
    def load(ctx: Any, ref: Any) -> Any:
        thread, swizzle = this_thread(), tile_swizzle(head_dim, smem.dtype)
        registers = _Fragments(tokens, head_dim)
        for row_tile in range(tokens // TILE_ROWS):
            for half in range(2):
                rows = thread.warp * 2 + (row_tile * 8 + half)
                for step in range(head_dim // 16):
                    offset = tile_offset(rows, thread.group, thread.pair * 4 + 16 * step, head_dim, swizzle)
                    low, high = widen_float8(*load_words(ref, offset, 4))
                    registers.put(row_tile, 2 * step, half, low)
                    registers.put(row_tile, 2 * step + 1, half, high)
        return registers.array(ir.F16Type.get())

    return load(smem)


def value_fragments(smem: Any) -> jax.Array:
    """[padded_rows(head_dim), tokens] in 16 bits as wgmma's left operand: V transposed; float8 becomes float16.

    Rows are permuted as `_dimension` says. Rows past head_dim repeat real ones.
    """
    tokens, head_dim = smem.shape
    rows, itemsize = padded_rows(head_dim), smem.dtype.itemsize
    dtype = jnp.float16 if itemsize == 1 else smem.dtype
    result = plgpu.ShapeDtypeStruct((rows, tokens), dtype, layout=plgpu.Layout.WGMMA)
    run = rows // 32  # neighbouring elements that a lane reads of a token

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(tile_transforms(head_dim, smem.dtype)),), return_type=result)
    def load(ctx: Any, ref: Any) -> Any:
        thread, swizzle = this_thread(), tile_swizzle(head_dim, smem.dtype)
        registers = _Fragments(rows, tokens)
        column = (thread.warp * 8 + thread.group).minimum(head_dim // run - 1) * (run * itemsize)
        for step in range(tokens // 8):
            first, second = (
                load_words(
                    ref,
                    tile_offset(int32(step), thread.pair * 2 + i, column, head_dim * itemsize, swizzle),
                    run * itemsize,
                )
                for i in range(2)
            )
            pairs: list[Any] = []
            for a, b in zip(first, second, strict=True):
                if itemsize == 2:
                    pairs += interleave_halves(a, b)
                    continue
                pairs += widen_float8(a, b)
                if run > 2:
                    pairs += widen_float8(*(arith.shrui(x, int32(16).value) for x in (a, b)))
            for i, word in enumerate(pairs):
                registers.put(i // 2, step, i % 2, word)
        element = ir.F16Type.get() if dtype == jnp.float16 else ir.BF16Type.get()
        return registers.array(element)

    return load(smem)


def _dimension(row_tile: int, half: int, thread: Any, rows: int, permuted: bool) -> Int32:
    """Which element of head_dim a lane's result row is, in the 64-row tile row_tile, half as in `_Fragments.put`."""
    if permuted:
        return (thread.warp * 8 + thread.group) * (rows // 32) + (2 * row_tile + half)
    return thread.warp * 16 + thread.group + (row_tile * TILE_ROWS + half * 8)


class _Fragments:
    """The registers of a [rows, columns] 16-bit array in the wgmma layout, as words of two neighbouring columns."""

    def __init__(self, rows: int, columns: int):
        self._shape = (rows, columns)
        self._words = np.empty((rows // TILE_ROWS, columns // 8, 2), dtype=object)

    def put(self, row_tile: int, column_tile: int, half: int, word: Any) -> None:
        """Sets the word in a 64 × 8 tile; half 0: in the first 8 of each warp's 16 rows, 1: in the others."""
        self._words[row_tile, column_tile, half] = word

    def array(self, element: Any) -> Any:
        layout: Any = plgpu.Layout.WGMMA.to_mgpu()
        pair = ir.VectorType.get((2,), element)
        registers = np.empty(self._words.size, dtype=object)
        registers[:] = [mgpu_utils.bitcast(word, pair) for word in self._words.flat]
        return mgpu.FragmentedArray(
            _registers=registers.reshape(layout.registers_shape(self._shape)), _layout=layout, _is_signed=None
        )


def reduce_tokens(values: jax.Array, scratch: Any, *, largest: bool) -> jax.Array:
    """Sum, or maximum, over the first dimension of float32 [tokens, columns] across the warpgroup.

    Args:
      scratch: shared memory float32 [4 * columns] of this warpgroup's own. Between two calls there must be a barrier.
    Returns: [columns] in COLUMNS layout.
    """
    tokens, columns = values.shape
    result = plgpu.ShapeDtypeStruct((columns,), jnp.float32, layout=COLUMNS)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()), return_type=result)
    def reduce(ctx: Any, values: Any, scratch: Any) -> Any:
        combine = arith.maximumf if largest else arith.addf
        thread = this_thread()
        registers = values.registers.reshape(tokens // TILE_ROWS, columns // 8, 2)
        kind = ir.VectorType.get((2,), ir.F32Type.get())
        index = ir.IndexType.get()

        def place(warp: Int32, column_tile: int) -> Any:
            return arith.index_cast(index, (warp * columns + thread.pair * 2 + column_tile * 8).value)

        for column_tile in range(columns // 8):
            first, *others = registers[:, column_tile].flat
            for other in others:
                first = combine(first, other)
            for distance in (4, 8, 16):
                first = combine(first, mgpu_utils.shfl_bfly(first, distance))
            vector.store(first, scratch, [place(thread.warp, column_tile)])
        mgpu_utils.warpgroup_barrier()
        reduced = []
        for column_tile in range(columns // 8):
            first, *others = (vector.load(kind, scratch, [place(int32(warp), column_tile)]) for warp in range(4))
            for other in others:
                first = combine(first, other)
            reduced.append(first)
        layout: Any = COLUMNS.to_mgpu()
        out = np.empty(len(reduced), dtype=object)
        out[:] = reduced
        return mgpu.FragmentedArray(
            _registers=out.reshape(layout.registers_shape((columns,))), _layout=layout, _is_signed=None
        )

    return reduce(values, scratch)


def store_weights(smem: Any, weights: jax.Array) -> None:
    """Writes weights [tokens, columns] (16 bits) to tiled shared memory [columns, tokens]. The caller commits them."""
    tokens, columns = weights.shape
    arg_types = (plgpu.RefType(tile_transforms(tokens, smem.dtype)), plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=arg_types)
    def store(ctx: Any, ref: Any, weights: Any) -> None:
        thread, swizzle = this_thread(), tile_swizzle(tokens, smem.dtype)
        registers = weights.registers.reshape(tokens // TILE_ROWS, columns // 8, 2)
        for (row_tile, column_tile, half), register in np.ndenumerate(registers):
            token = _dimension(row_tile, half, thread, tokens, permuted=False)
            for i in range(2):
                place = tile_offset(int32(column_tile), thread.pair * 2 + i, token * 2, tokens * 2, swizzle)
                llvm.store(llvm.extractelement(register, int32(i).value), pointer(ref, place))

    store(smem, weights)


def store_columns(ref: Any, values: jax.Array, group: int, head_dim: int, *, permuted: bool) -> None:
    """Writes results [rows, columns] to global memory [group * head_dim], query by query.

    Args:
      permuted: the rows stand in value_fragments' order.
    """
    rows, columns = values.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def store(ctx: Any, ref: Any, values: Any) -> None:
        thread, itemsize = this_thread(), mgpu_utils.bytewidth(values.mlir_dtype)
        registers = values.registers.reshape(rows // TILE_ROWS, columns // 8, 2)
        for (row_tile, column_tile, half), register in np.ndenumerate(registers):
            dimension = _dimension(row_tile, half, thread, rows, permuted)
            for i in range(2):
                column = thread.pair * 2 + (8 * column_tile + i)
                keep = column.below(group)
                if rows != head_dim:
                    keep = arith.andi(keep, dimension.below(head_dim))
                with mgpu_utils.when(keep):
                    place = (column * head_dim + dimension) * itemsize
                    llvm.store(llvm.extractelement(register, int32(i).value), pointer(ref, place))

    store(ref, values)


def load_vector(ref: Any, columns: int) -> jax.Array:
    """[columns] in COLUMNS layout from global memory float32 [n <= columns]; the last element repeats."""
    count = ref.shape[0]
    result = plgpu.ShapeDtypeStruct((columns,), jnp.float32, layout=COLUMNS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def load(ctx: Any, ref: Any) -> Any:
        thread, layout = this_thread(), COLUMNS.to_mgpu()
        registers = np.empty(layout.registers_shape((columns,)), dtype=object)
        for column_tile, place in enumerate(np.ndindex(registers.shape)):
            indices = [(thread.pair * 2 + (8 * column_tile + i)).minimum(count - 1) for i in range(2)]
            elements = [llvm.load(ir.F32Type.get(), pointer(ref, index * 4)) for index in indices]
            registers[place] = vector.from_elements(ir.VectorType.get((2,), ir.F32Type.get()), elements)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(ref)


def load_spread(ref: Any, size: int, layout: Any, group: int, head_dim: int) -> jax.Array:
    """float32 [size] in a WG_STRIDED layout from global memory [>= group]: element i is ref[i // head_dim].

    Elements past group * head_dim repeat the last member's. The layout's vectors must not cross members.
    """
    result = plgpu.ShapeDtypeStruct((size,), jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def load(ctx: Any, ref: Any) -> Any:
        strided: Any = layout.to_mgpu()
        kind = ir.VectorType.get((strided.vec_size,), ir.F32Type.get())
        registers = np.empty(strided.registers_shape((size,)), dtype=object)
        for place, index in zip(np.ndindex(registers.shape), strided.linear_thread_idxs(), strict=True):
            element = Int32(arith.index_cast(ir.IntegerType.get_signless(32), index))
            member = (element // head_dim).minimum(group - 1)
            registers[place] = vector.broadcast(kind, llvm.load(ir.F32Type.get(), pointer(ref, member * 4)))
        return mgpu.FragmentedArray(_registers=registers, _layout=strided, _is_signed=None)

    return load(ref)


def store_vector(ref: Any, values: jax.Array) -> None:
    """Writes a [columns] vector in COLUMNS layout to global memory [columns]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), COLUMNS))
    def store(ctx: Any, ref: Any, values: Any) -> None:
        thread = this_thread()
        with mgpu_utils.when(thread.index.below(4)):
            for column_tile, register in enumerate(values.registers.flat):
                llvm.store(register, pointer(ref, (thread.pair * 2 + 8 * column_tile) * 4))

    store(ref, values)


def clear_tokens_outside(smem: Any, begin: jax.Array, end: jax.Array) -> None:
    """Zeroes the rows below `begin` and from `end` on of tiled [tokens, head_dim] V: NaN may stand there, and 0 * NaN
    is NaN. All threads of one warpgroup take part; ends with a barrier and what makes the writes visible to wgmma."""
    tokens, head_dim = smem.shape
    row_bytes = head_dim * smem.dtype.itemsize
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(tile_transforms(head_dim, smem.dtype)), splat, splat))
    def clear(ctx: Any, ref: Any, begin: Any, end: Any) -> None:
        swizzle = tile_swizzle(head_dim, smem.dtype)
        low, high = (Int32(x.registers.item()) for x in (begin, end))
        zeros = zero_words(4)
        for first in range(0, tokens * row_bytes // 16, 128):
            chunk = this_thread().index + first
            # A swizzle moves chunks inside their row: a row's chunks are the same set as without it.
            tile, inside = chunk // (swizzle // 2), chunk % (swizzle // 2)
            row = tile // (row_bytes // swizzle) * 8 + inside // (swizzle // 16)
            outside = arith.ori(row.below(low), arith.cmpi(arith.CmpIPredicate.sge, row.value, high.value))
            with mgpu_utils.when(outside):
                llvm.store(zeros, pointer(ref, chunk * 16))

    clear(smem, begin, end)
    plgpu.commit_smem()


def last_to_arrive(counters: Any, index: jax.Array, pieces: jax.Array, flag: Any) -> None:
    """Counts this warpgroup among those that left a piece; flag becomes 1 for the last of `pieces`, else 0.

    Everything that the others wrote to global memory before they arrived is then visible. The last one sets the
    counter back to 0, so that between launches all counters are 0.

    Args:
      counters: int32 in GMEM; flag: int32 [1] in this warpgroup's shared memory.
    """
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, splat, plgpu.RefType()))
    def arrive(ctx: Any, counters: Any, index: Any, pieces: Any, flag: Any) -> None:
        # Barriers before and after one thread's acquire and release order what all threads of the warpgroup write and
        # read: causality is transitive in PTX's memory model. A fence of every thread would cost its latency twice.
        mgpu_utils.warpgroup_barrier()
        with mgpu_utils.when(this_thread().index.below(1)):
            address = pointer(counters, Int32(index.registers.item()) * 4)
            before = llvm.inline_asm(
                ir.IntegerType.get_signless(32),
                [llvm.ptrtoint(ir.IntegerType.get_signless(64), address)],
                "atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;",
                "=r,l,~{memory}",
                has_side_effects=True,
            )
            last = (Int32(before) + 1).equals(Int32(pieces.registers.item()))
            with mgpu_utils.when(last):
                llvm.store(int32(0).value, address)
            llvm.store(arith.extui(ir.IntegerType.get_signless(32), last), pointer(flag, int32(0)))
        mgpu_utils.warpgroup_barrier()

    arrive(counters, index, pieces, flag)
