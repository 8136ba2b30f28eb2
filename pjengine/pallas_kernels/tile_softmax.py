"""Softmax arithmetic on wgmma tiles that Pallas cannot say: sums apart by lane, rescaling only where it is needed."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from pjengine.pallas_kernels.registers import int32

_IF: Any = scf.IfOp  # jaxlib's own constructor, unlike the generated one that the type stubs show
PARTS = 8  # columns of a tile whose rows hold sums that are still apart by lane: two a lane


def add_parts(total: jax.Array, values: jax.Array) -> jax.Array:
    """total [rows, PARTS] plus the columns of values [rows, n], each added to one in the same lane.

    Both are float32 in the wgmma accumulator layout. A row's sum of the result is its sum of both; lanes need not talk.
    """
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(total.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=result)
    def add(ctx: Any, total: Any, values: Any) -> Any:
        terms = [values.registers[:, i : i + 1] for i in range(values.registers.shape[1])]
        while len(terms) > 1:  # a tree: short chains of dependent additions
            terms = [_add(*terms[i : i + 2]) if i + 1 < len(terms) else terms[i] for i in range(0, len(terms), 2)]
        registers = _add(total.registers, terms[0])
        return mgpu.FragmentedArray(_registers=registers, _layout=total.layout, _is_signed=None)

    return add(total, values)


def _add(a: Any, b: Any) -> Any:
    registers = np.empty_like(a)
    for place, register in np.ndenumerate(a):
        registers[place] = arith.addf(register, b[place])
    return registers


def rescale_if_needed(tile: jax.Array, factors: jax.Array) -> jax.Array:
    """Rows of a float32 tile times their factors; a warp whose factors are all 1 skips it.

    Args:
      tile: [rows, columns] in the wgmma accumulator layout; factors: [rows] in the layout of its row reductions.
    """
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(tile.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, layout.reduce(1)), return_type=result)
    def rescale(ctx: Any, tile: Any, factors: Any) -> Any:
        one = mgpu.c(1.0, ir.F32Type.get())
        needed = None
        for factor in factors.registers.flat:
            scalar = vector.extract(factor, dynamic_position=[], static_position=[0])
            changed = arith.cmpf(arith.CmpFPredicate.UNE, scalar, one)
            needed = changed if needed is None else arith.ori(needed, changed)
        branch: Any = _IF(_any_lane(needed), [x.type for x in tile.registers.flat], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            spread = factors.broadcast_in_dim(tile.shape, (0,), tile.layout)
            scf.yield_([arith.mulf(x, f) for x, f in zip(tile.registers.flat, spread.registers.flat, strict=True)])
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(list(tile.registers.flat))
        registers = np.empty_like(tile.registers)
        registers.flat = list(branch.results)
        return mgpu.FragmentedArray(_registers=registers, _layout=tile.layout, _is_signed=None)

    return rescale(tile, factors)


def widen_with_zeros(tile: jax.Array, columns: int) -> jax.Array:
    """A 16-bit tile [rows, n] in the wgmma accumulator layout, followed by zeros up to [rows, columns]."""
    if tile.shape[1] == columns:
        return tile
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct((tile.shape[0], columns), tile.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def widen(ctx: Any, tile: Any) -> Any:
        kind = tile.registers.flat[0].type
        zero = vector.broadcast(kind, mgpu.c(0.0, tile.mlir_dtype))
        shape = list(tile.registers.shape)
        shape[1] = columns // 8
        registers = np.full(shape, zero, dtype=object)
        registers[:, : tile.registers.shape[1]] = tile.registers
        return mgpu.FragmentedArray(_registers=registers, _layout=tile.layout, _is_signed=None)

    return widen(tile)


def _any_lane(predicate: Any) -> Any:
    """Whether a predicate holds in any lane of the warp."""
    word = ir.IntegerType.get_signless(32)
    text = (
        "{ .reg .pred own, any; setp.ne.b32 own, $1, 0; "
        "vote.sync.any.pred any, own, 0xffffffff; selp.b32 $0, 1, 0, any; }"
    )
    voted: Any = llvm.inline_asm(word, [arith.extui(word, predicate)], text, "=r,r", has_side_effects=True)
    return arith.cmpi(arith.CmpIPredicate.ne, voted, int32(0).value)
