"""Norms and rotation of heads in a product's sums, and their way into pages; per-thread code.

A wgmma's thread holds, of each of two rows, 2 of every 8 columns: so elements i and i + head_dim / 2 of a head, which
turn together, lie in the same thread, and the 4 threads of a quad hold all of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector
from jaxlib.mlir.dialects import math as mlir_math

from pjengine.pallas_kernels.backends import TILE_ROWS
from pjengine.pallas_kernels.mosaic_common import tile_swizzle, tile_transforms
from pjengine.pallas_kernels.persistent_product.products import LAYOUT
from pjengine.pallas_kernels.persistent_product.tiles import COLUMNS
from pjengine.pallas_kernels.registers import (
    Int32,
    far_pointer,
    float32,
    int32,
    load_words,
    over_lanes,
    page_item,
    pointer,
    this_thread,
    tile_offset,
    words,
)
from pjengine.pallas_kernels.specs import QKVSpec

_IF: Any = scf.IfOp  # jaxlib's own constructor, unlike the generated one that the type stubs show
_SPLAT = plgpu.Layout.WG_SPLAT
_EIGHT = 8  # columns of which a thread holds a pair
_QUAD = 4


def load_angles(cos: Any, sin: Any, row: jax.Array) -> jax.Array:
    """float32 [64, head_dim], cos beside sin, of the rows from `row` on; the last row again where there are no more.

    Args:
      cos, sin: GMEM references, float32 [T, head_dim // 2].
    """
    tokens, half = cos.shape
    result = plgpu.ShapeDtypeStruct((TILE_ROWS, 2 * half), jnp.float32, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), _SPLAT), return_type=result)
    def load(ctx: Any, cos: Any, sin: Any, first: Any) -> Any:
        rows = [row.minimum(tokens - 1) for row in _own_rows(Int32(first.registers.item()))]
        pair = this_thread().pair
        kind = _pair_of(ir.F32Type.get())
        registers = np.empty(LAYOUT.to_mgpu().registers_shape((TILE_ROWS, 2 * half)), dtype=object)
        grid = registers.reshape(-1, 2)
        for j, i in np.ndindex(*grid.shape):
            source, column = (cos, j * _EIGHT) if j < len(grid) // 2 else (sin, j * _EIGHT - half)
            grid[j, i] = llvm.load(kind, pointer(source, (rows[i] * half + pair * 2 + column) * 4))
        # Fetched before the wait for the last products, not after.
        return fragmented_array.optimization_barrier(_fragments(registers))

    return load(cos, sin, row)


def turn_heads(
    sums: jax.Array,
    angles: jax.Array,
    bias: Any | None,
    norms: Sequence[Any],
    first: jax.Array,
    *,
    block: int,
    spec: QKVSpec,
) -> jax.Array:
    """The heads of a block of columns, q's and k's normalised and rotated: [64, 128] in the spec's dtype.

    Args:
      sums: [64, 2 * 128]; angles: as `load_angles` returns them.
      bias: GMEM reference [n] or None; norms: those of q's and k's weights [head_dim], or none.
      first: which of the projection's columns is the block's first; block: 0 or 1, which of the sums' they are.
    """
    refs = [*([] if bias is None else [bias]), *norms]
    dtype, per_head = jnp.dtype(spec.dtype), spec.head_dim // _EIGHT
    result = plgpu.ShapeDtypeStruct((TILE_ROWS, COLUMNS), dtype, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(LAYOUT, LAYOUT, _SPLAT, *[plgpu.RefType()] * len(refs)), return_type=result)
    def turn(ctx: Any, sums: Any, angles: Any, first: Any, *refs: Any) -> Any:
        begin, angle_grid = Int32(first.registers.item()), angles.registers.reshape(-1, 2)
        source = sums[:, block * COLUMNS : (block + 1) * COLUMNS].registers.reshape(-1, 2)
        narrow = _pair_of(mgpu_utils.dtype_to_ir_type(dtype))
        registers = np.empty(LAYOUT.to_mgpu().registers_shape((TILE_ROWS, COLUMNS)), dtype=object)
        grid = registers.reshape(-1, 2)
        for start in range(0, len(grid), per_head):
            own = slice(start, start + per_head)
            column = begin + start * _EIGHT
            head = column // spec.head_dim
            pairs = source[own] if bias is None else _with_bias(source[own], refs[0], column, narrow)
            turns = _IF(head.below(spec.heads + spec.kv_heads), [narrow] * pairs.size, has_else=True)
            with ir.InsertionPoint(turns.then_block):
                turned = pairs
                if spec.norm_eps is not None:
                    place = _select(head.below(spec.heads), *refs[-2:])
                    turned = _normalised(pairs, place, narrow, spec.head_dim, spec.norm_eps)
                scf.yield_([arith.truncf(narrow, x) for x in _rotated(turned, angle_grid).flat])
            with ir.InsertionPoint(turns.else_block):
                scf.yield_([arith.truncf(narrow, x) for x in pairs.flat])
            grid[own] = np.array(list(turns.results), dtype=object).reshape(pairs.shape)
        return _fragments(registers)

    return turn(sums, angles, first, *refs)


def store_in_pages(
    staged: Any, k_pages: Any, v_pages: Any, slots: Any, row: jax.Array, head: jax.Array, *, spec: QKVSpec
) -> None:
    """Writes heads of k or of v to their tokens' slots.

    Args:
      staged: [64, 128] in tiles of `tile_transforms`, committed before.
      k_pages, v_pages: GMEM references [pages, kv_heads, page_size, head_dim]; slots: that of int32 [T], negative ones
        are not written.
      row: first token of the tile; it may go beyond the last one.
      head: the tile's first, k's counted from 0 on, then v's; all are of one kind.
    """
    (tokens,), (_, kv_heads, page_size, head_dim) = slots.shape, k_pages.shape
    nbytes = jnp.dtype(spec.dtype).itemsize
    row_bytes, chunks, per_head = COLUMNS * nbytes, COLUMNS * nbytes // 16, head_dim * nbytes // 16
    arg_types = (plgpu.RefType(tile_transforms(COLUMNS, staged.dtype)), *[plgpu.RefType()] * 3, _SPLAT, _SPLAT)

    @plgpu.inline_mgpu(arg_types=arg_types)
    def store(ctx: Any, source: Any, k_pages: Any, v_pages: Any, slots: Any, row: Any, head: Any) -> None:
        first, own = Int32(row.registers.item()), Int32(head.registers.item())
        pool = _select(own.below(kv_heads), k_pages, v_pages)
        thread = this_thread().index
        chunk = thread % chunks
        own = own % kv_heads + chunk // per_head
        rows = [thread // chunks + begin for begin in range(0, TILE_ROWS, 128 // chunks)]
        tokens_of = [first + x for x in rows]
        places = [Int32(*load_words(slots, x.minimum(tokens - 1) * 4, 4)) for x in tokens_of]
        swizzle = tile_swizzle(COLUMNS, staged.dtype)
        values = [
            llvm.load(words(4), pointer(source, tile_offset(x // 8, x % 8, chunk * 16, row_bytes, swizzle)))
            for x in rows
        ]
        for token, slot, value in zip(tokens_of, places, values, strict=True):
            written = arith.andi(token.below(tokens), arith.cmpi(arith.CmpIPredicate.sge, slot.value, int32(0).value))
            item = page_item(slot, own, kv_heads, page_size)
            _store_if(written, value, far_pointer(pool, item, head_dim * nbytes, chunk % per_head * 16))

    store(staged, k_pages, v_pages, slots, row, head)


def _own_rows(first: Int32) -> list[Int32]:
    """The two rows of a wgmma's tile that this thread holds elements of."""
    thread = this_thread()
    row = first + thread.warp * 16 + thread.group
    return [row, row + _EIGHT]


def _with_bias(pairs: Any, bias: Any, column: Int32, kind: Any) -> Any:
    result = np.empty_like(pairs)
    for j, values in enumerate(_load_columns(mgpu_utils.memref_ptr(bias), column, len(pairs), kind)):
        for i in (0, 1):
            result[j, i] = arith.addf(pairs[j, i], values)
    return result


def _normalised(pairs: Any, weight: Any, kind: Any, head_dim: int, eps: float) -> Any:
    """`rms_norm` of the rows, in float32; all of the warp must call it. weight: address of [head_dim]."""
    weights = _load_columns(weight, int32(0), len(pairs), kind)
    result = np.empty_like(pairs)
    half = len(pairs) // 2
    for i in (0, 1):
        sums = []
        for part in (pairs[:half, i], pairs[half:, i]):  # two chains
            total = arith.mulf(part[0], part[0])
            for x in part[1:]:
                total = mlir_math.fma(x, x, total)
            sums += [_element(total, place) for place in (0, 1)]
        squares = arith.addf(arith.addf(sums[0], sums[1]), arith.addf(sums[2], sums[3]))
        mean = arith.mulf(over_lanes(squares, arith.addf, _QUAD), float32(1.0 / head_dim))
        inverse = vector.broadcast(_pair_of(ir.F32Type.get()), mlir_math.rsqrt(arith.addf(mean, float32(eps))))
        for j, x in enumerate(pairs[:, i]):
            result[j, i] = arith.mulf(arith.mulf(x, inverse), weights[j])
    return result


def _rotated(pairs: Any, angles: Any) -> Any:
    result = np.empty_like(pairs)
    half = len(pairs) // 2
    for j, i in np.ndindex(half, 2):
        a, b, cos, sin = pairs[j, i], pairs[j + half, i], angles[j, i], angles[j + half, i]
        result[j, i] = mlir_math.fma(a, cos, arith.negf(arith.mulf(b, sin)))
        result[j + half, i] = mlir_math.fma(b, cos, arith.mulf(a, sin))
    return result


def _load_columns(base: Any, first: Int32, count: int, kind: Any) -> list[Any]:
    """This thread's pair of each of `count` eights of columns of a 16-bit vector, in float32. base: its address."""
    wide = _pair_of(ir.F32Type.get())
    offset = (first + this_thread().pair * 2) * 2
    places = [pointer(base, offset + j * 2 * _EIGHT) for j in range(count)]
    return [arith.extf(wide, llvm.load(kind, place)) for place in places]


def _select(condition: Any, first: Any, second: Any) -> Any:
    """The address of one of two references."""
    return llvm.select(condition, mgpu_utils.memref_ptr(first), mgpu_utils.memref_ptr(second))


def _store_if(condition: Any, value: Any, place: Any) -> None:
    """A predicated store of 16 bytes: behind a branch its load would wait for the store before."""
    flag = arith.extui(words(1), condition)
    parts = [llvm.extractelement(value, int32(i).value) for i in range(4)]
    text = "{ .reg .pred p; setp.ne.u32 p, $0, 0; @p st.global.v4.b32 [$1], {$2, $3, $4, $5}; }"
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [flag, place, *parts], text, "r,l,r,r,r,r", has_side_effects=True)


def _pair_of(element: Any) -> Any:
    return ir.VectorType.get((2,), element)


def _element(pair: Any, place: int) -> Any:
    return vector.extract(pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([place]))


def _fragments(registers: Any) -> Any:
    return mgpu.FragmentedArray(_registers=registers, _layout=LAYOUT.to_mgpu(), _is_signed=None)
