"""Norms and activations of the encoder's kernel, in float32 registers."""

from __future__ import annotations

import functools
import math
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir.dialects import arith, llvm

from pjengine.pallas_kernels.encoder_stack.api import TOKENS
from pjengine.pallas_kernels.encoder_stack.block import Block, load_row
from pjengine.pallas_kernels.mosaic_common import LOG2E
from pjengine.pallas_kernels.registers import Int32, approximate, float32, int32, load_words, over_lanes, pointer, words
from pjengine.pallas_kernels.warp_code import block_barrier, from_bfloat16_pair, to_bfloat16_pair


def affine(block: Block, layer: Int32, index: int) -> list[list[Any]]:
    """Words of a norm's weight and bias that this lane multiplies by and adds. index: in `PackedLayers.norms`."""
    nbytes, places = _row_places(block)
    hidden = block.shape.hidden
    return [
        [w for place in places for w in load_words(block["norms"], (layer * 4 + i) * (2 * hidden) + place, nbytes)]
        for i in (index, index + 1)
    ]


def norm(block: Block, weights: list[list[Any]]) -> None:
    """Layer norm of y's rows to shared memory, weights as of `affine`; a warp takes a row. Padding's are the bias."""
    shape = block.shape
    nbytes, places = _row_places(block)
    weight, bias = (_floats(part) for part in weights)
    for first in range(0, TOKENS, shape.heads):
        row = block.warp + first
        with mgpu_utils.when(row.below(TOKENS)):
            loaded = [load_row(block, "y", row, row * (2 * shape.hidden) + place, nbytes) for place in places]
            values = [value for part in loaded for value in _floats(part)]
            mean = _mean(values, shape.hidden)
            values = [arith.subf(value, mean) for value in values]
            variance = _mean([arith.mulf(value, value) for value in values], shape.hidden)
            inverse = approximate("rsqrt", arith.addf(variance, float32(shape.eps)))
            results = [
                arith.addf(arith.mulf(arith.mulf(value, inverse), w), b)
                for value, w, b in zip(values, weight, bias, strict=True)
            ]
            pairs = [to_bfloat16_pair(*results[i : i + 2]) for i in range(0, len(results), 2)]
            each = nbytes // 4
            for i, place in enumerate(places):
                packed = llvm.mlir_undef(words(each))
                for j in range(each):
                    packed = llvm.insertelement(packed, pairs[i * each + j], int32(j).value)
                llvm.store(packed, pointer(block["rows"], row * shape.row + place))
    block_barrier()


def gelu(x: Any) -> Any:
    """x * Phi(x) (arXiv:1606.08415), with erfc by Abramowitz and Stegun's 7.1.26, whose error is 1.5e-7."""
    size = arith.mulf(arith.maximumf(x, arith.negf(x)), float32(math.sqrt(0.5)))
    t = approximate("rcp", arith.addf(arith.mulf(size, float32(0.3275911)), float32(1.0)))
    series = float32(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = arith.addf(arith.mulf(series, t), float32(coefficient))
    bell = approximate("ex2", arith.mulf(arith.mulf(size, size), float32(-LOG2E)))
    tail = arith.mulf(arith.mulf(arith.mulf(series, t), bell), float32(0.5))
    positive = arith.cmpf(arith.CmpFPredicate.OGE, x, float32(0.0))
    return arith.mulf(x, arith.select(positive, arith.subf(float32(1.0), tail), tail))


def _row_places(block: Block) -> tuple[int, list[Int32]]:
    """Size and offsets of the vectors that a lane has of a row of `hidden` elements, in bytes."""
    nbytes = 16 if block.shape.hidden % 256 == 0 else 8
    return nbytes, [(block.lane + 32 * i) * nbytes for i in range(2 * block.shape.hidden // (32 * nbytes))]


def _floats(pairs: list[Any]) -> list[Any]:
    return [value for word in pairs for value in from_bfloat16_pair(word)]


def _mean(values: list[Any], count: int) -> Any:
    """Of all values that the lanes of a warp hold."""
    total = over_lanes(functools.reduce(arith.addf, values), arith.addf, 32)
    return arith.mulf(total, float32(1.0 / count))
