"""Per-thread code that normalises and rotates heads of q and k; only for use inside `plgpu.inline_mgpu`.

A piece of a head is what one thread holds of it: 8 elements of the first half and the 8 of the second that they turn
with, a vector of 16 bytes each. The threads that hold a head are neighbours, so that they add its squares by shuffles.
Nothing is rounded between norm and rotation: a model in float32 would not, and XLA does not where it fuses the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as mlir_math

from pjengine.pallas_kernels.head_sizes import PIECE, VECTOR
from pjengine.pallas_kernels.registers import Int32, far_pointer, float32, over_lanes, pointer

Piece = list[Any]  # two vectors


def load_piece(ref: Any, head: Int32, column: Int32, head_dim: int) -> Piece:
    """Piece `column` of head number `head` of ref [heads, head_dim], with any axes before."""
    kind = ir.VectorType.get((VECTOR,), ir.MemRefType(ref.type).element_type)
    return [llvm.load(kind, place) for place in _places(ref, head, column, head_dim)]


def store_piece(piece: Piece, ref: Any, head: Int32, column: Int32, head_dim: int) -> None:
    """The counterpart of `load_piece`."""
    for half, place in zip(piece, _places(ref, head, column, head_dim), strict=True):
        llvm.store(half, place)


def _places(ref: Any, head: Int32, column: Int32, head_dim: int) -> list[Any]:
    half = head_dim  # bytes, of 16-bit elements
    return [far_pointer(ref, head, 2 * half, column * (2 * VECTOR) + i * half) for i in (0, 1)]


def load_weights(norms: Sequence[Any], of_q: Any, column: Int32, head_dim: int) -> Piece:
    """The weights of a piece, from q's [head_dim] where the predicate of_q holds, else from k's."""
    q_norm, k_norm = norms
    kind = ir.VectorType.get((VECTOR,), ir.MemRefType(q_norm.type).element_type)
    offsets = (column * (2 * VECTOR) + i * head_dim for i in (0, 1))
    return [llvm.load(kind, llvm.select(of_q, pointer(q_norm, at), pointer(k_norm, at))) for at in offsets]


def load_angles(cos: Any, sin: Any, token: Int32, column: Int32, head_dim: int) -> tuple[Any, Any]:
    """cos and sin of a piece, from float32 [T, head_dim // 2] each."""
    place = (token * (head_dim // 2) + column * VECTOR) * 4
    return llvm.load(_wide(), pointer(cos, place)), llvm.load(_wide(), pointer(sin, place))


def widened(piece: Piece) -> Piece:
    """In float32."""
    return [arith.extf(_wide(), half) for half in piece]


def normalised(piece: Piece, weights: Piece, head_dim: int, eps: float) -> Piece:
    """`rms_norm` of heads whose pieces the threads of a warp hold, in float32; all of the warp must call it."""
    a, b = piece
    squares = mlir_math.fma(b, b, arith.mulf(a, a))
    parts = [
        vector.extract(squares, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for i in range(VECTOR)
    ]
    while len(parts) > 1:
        parts = [arith.addf(x, y) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    (total,) = parts
    mean = arith.mulf(over_lanes(total, arith.addf, head_dim // PIECE), float32(1.0 / head_dim))
    inverse = vector.broadcast(_wide(), mlir_math.rsqrt(arith.addf(mean, float32(eps))))
    return [arith.mulf(arith.mulf(half, inverse), w) for half, w in zip(piece, widened(weights), strict=True)]


def rotated(piece: Piece, angles: tuple[Any, Any], kind: Any) -> Piece:
    """`apply_rope` of a piece in float32, in vectors of `kind`; angles: as `load_angles` has them."""
    (a, b), (cos, sin) = piece, angles
    left = mlir_math.fma(a, cos, arith.negf(arith.mulf(b, sin)))
    right = mlir_math.fma(b, cos, arith.mulf(a, sin))
    return [arith.truncf(kind, turned) for turned in (left, right)]


def _wide() -> Any:
    return ir.VectorType.get((VECTOR,), ir.F32Type.get())
