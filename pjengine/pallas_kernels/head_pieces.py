"""Per-thread code that normalises and rotates heads of q and k; only for use inside `plgpu.inline_mgpu`.

A piece of a head is what one thread holds of it: 8 elements of the first half and the 8 of the second that they turn
with, a vector of 16 bytes each; fewer (`width`, a power of two) where registers are short. The threads that hold a head
are neighbours, so that they add its squares by shuffles, in the same order whatever the width.
Nothing is rounded between norm and rotation: a model in float32 would not, and XLA does not where it fuses the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as mlir_math

from pjengine.pallas_kernels.head_sizes import VECTOR
from pjengine.pallas_kernels.registers import Int32, far_pointer, float32, over_lanes, pointer

Piece = list[Any]  # two vectors


def load_piece(ref: Any, head: Int32, column: Int32, head_dim: int, width: int = VECTOR) -> Piece:
    """Piece `column` of head number `head` of ref [heads, head_dim], with any axes before."""
    kind = ir.VectorType.get((width,), ir.MemRefType(ref.type).element_type)
    return [llvm.load(kind, place) for place in _places(ref, head, column, head_dim, width)]


def store_piece(piece: Piece, ref: Any, head: Int32, column: Int32, head_dim: int) -> None:
    """The counterpart of `load_piece`."""
    for half, place in zip(piece, _places(ref, head, column, head_dim, _width(piece[0])), strict=True):
        llvm.store(half, place)


def _places(ref: Any, head: Int32, column: Int32, head_dim: int, width: int) -> list[Any]:
    return both_halves(far_pointer(ref, head, 2 * head_dim, column * (2 * width)), head_dim)


def both_halves(place: Any, head_dim: int) -> list[Any]:
    """The addresses of a piece's two vectors; a second one apart by a constant costs no register."""
    byte, long = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(64)
    return [place, mgpu_utils.getelementptr(place, [mgpu.c(head_dim, long)], byte)]


def load_weights(norms: Sequence[Any], of_q: Any, column: Int32, head_dim: int, width: int = VECTOR) -> Piece:
    """The weights of a piece, from q's [head_dim] where the predicate of_q holds, else from k's."""
    q_norm, k_norm = norms
    kind = ir.VectorType.get((width,), ir.MemRefType(q_norm.type).element_type)
    at = column * (2 * width)
    place = llvm.select(of_q, pointer(q_norm, at), pointer(k_norm, at))
    return [llvm.load(kind, half) for half in both_halves(place, head_dim)]


def load_angles(cos: Any, sin: Any, token: Int32, column: Int32, head_dim: int, width: int = VECTOR) -> tuple[Any, Any]:
    """cos and sin of a piece, from float32 [T, head_dim // 2] each."""
    place = (token * (head_dim // 2) + column * width) * 4
    return llvm.load(_wide(width), pointer(cos, place)), llvm.load(_wide(width), pointer(sin, place))


def widened(piece: Piece) -> Piece:
    """In float32."""
    return [arith.extf(_wide(_width(half)), half) for half in piece]


def normalised(piece: Piece, weights: Piece, head_dim: int, eps: float) -> Piece:
    """`rms_norm` of heads whose pieces the threads of a warp hold, in float32; all of the warp must call it."""
    a, b = piece
    width = _width(a)
    squares = mlir_math.fma(b, b, arith.mulf(a, a))
    parts = [
        vector.extract(squares, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for i in range(width)
    ]
    while len(parts) > 1:
        parts = [arith.addf(x, y) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    (total,) = parts
    mean = arith.mulf(over_lanes(total, arith.addf, head_dim // (2 * width)), float32(1.0 / head_dim))
    inverse = vector.broadcast(_wide(width), mlir_math.rsqrt(arith.addf(mean, float32(eps))))
    return [arith.mulf(arith.mulf(half, inverse), w) for half, w in zip(piece, widened(weights), strict=True)]


def rotated(piece: Piece, angles: tuple[Any, Any], kind: Any) -> Piece:
    """`apply_rope` of a piece in float32, in vectors of `kind`; angles: as `load_angles` has them."""
    (a, b), (cos, sin) = piece, angles
    left = mlir_math.fma(a, cos, arith.negf(arith.mulf(b, sin)))
    right = mlir_math.fma(b, cos, arith.mulf(a, sin))
    return [arith.truncf(kind, turned) for turned in (left, right)]


def _wide(width: int) -> Any:
    return ir.VectorType.get((width,), ir.F32Type.get())


def _width(half: Any) -> int:
    return int(ir.VectorType(half.type).shape[0])
