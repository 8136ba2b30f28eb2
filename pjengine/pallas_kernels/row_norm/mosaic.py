"""Norms of rows on Hopper: a warp holds whole rows in registers, so each is read once and summed by shuffles."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as mlir_math

from pjengine.pallas_kernels.mosaic_common import launch
from pjengine.pallas_kernels.registers import Int32, far_pointer, float32, over_lanes, pointer, this_thread
from pjengine.pallas_kernels.row_norm.api import LANES, VECTOR
from pjengine.pallas_kernels.specs import RowNormSpec

_WARPS = 4
_LOADS = 8  # of a lane that are under way at once: as many rows as that takes


@functools.partial(jax.jit, static_argnames="spec")
def normalise_rows(x: jax.Array, affine: tuple[jax.Array, ...], *, spec: RowNormSpec) -> jax.Array:
    """`rms_norm` or `layer_norm` of x [T, hidden]; affine: weight and, where there is one, bias."""
    rows = max(1, _LOADS // (spec.hidden // (LANES * VECTOR)))
    (normalised,) = launch(
        functools.partial(_kernel, spec=spec, tokens=x.shape[0], rows=rows),
        (x, *affine),
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype),),
        scratch={},
        grid={"block": pl.cdiv(x.shape[0], _WARPS * rows)},
        name="row_norm",
    )
    return normalised


def _kernel(*refs: Any, spec: RowNormSpec, tokens: int, rows: int) -> None:
    vectors, row_bytes = spec.hidden // (LANES * VECTOR), 2 * spec.hidden

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(refs), plgpu.Layout.WG_SPLAT))
    def normalise(ctx: Any, x: Any, *others: Any) -> None:
        *affine, out, block = others
        thread = this_thread()
        lane = thread.index % LANES
        places = [(lane + v * LANES) * (2 * VECTOR) for v in range(vectors)]
        kind = ir.VectorType.get((VECTOR,), ir.MemRefType(x.type).element_type)
        first = (Int32(block.registers.item()) * _WARPS + thread.warp) * rows
        own = [first + r for r in range(rows)]
        held = [
            [llvm.load(kind, far_pointer(x, row.minimum(tokens - 1), row_bytes, place)) for place in places]
            for row in own
        ]
        weight, *bias = ([llvm.load(kind, pointer(ref, place)) for place in places] for ref in affine)
        for row, values in zip(own, held, strict=True):
            wide = [_wide(value) for value in values]
            if spec.centred:
                mean = _splat(_mean(wide, spec.hidden))
                wide = [arith.subf(value, mean) for value in wide]
            squares = arith.addf(_mean([arith.mulf(v, v) for v in wide], spec.hidden), float32(spec.eps))
            inverse = _splat(mlir_math.rsqrt(squares))
            results = [arith.mulf(arith.mulf(v, inverse), _wide(w)) for v, w in zip(wide, weight, strict=True)]
            for offsets in bias:
                results = [arith.addf(v, _wide(b)) for v, b in zip(results, offsets, strict=True)]
            with mgpu_utils.when(row.below(tokens)):
                for value, place in zip(results, places, strict=True):
                    llvm.store(arith.truncf(kind, value), far_pointer(out, row, row_bytes, place))

    normalise(*refs, lax.axis_index("block"))


def _mean(vectors: list[Any], hidden: int) -> Any:
    """Of all elements that the lanes of a warp hold; the same in each lane. All of the warp must call it."""
    sums = functools.reduce(arith.addf, vectors)
    total = vector.reduction(ir.F32Type.get(), vector.CombiningKind.ADD, sums)
    return arith.mulf(over_lanes(total, arith.addf, LANES), float32(1.0 / hidden))


def _wide(value: Any) -> Any:
    return arith.extf(ir.VectorType.get((VECTOR,), ir.F32Type.get()), value)


def _splat(value: Any) -> Any:
    return vector.broadcast(ir.VectorType.get((VECTOR,), ir.F32Type.get()), value)
