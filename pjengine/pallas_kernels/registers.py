"""Per-thread code for the Mosaic GPU kernels, where Pallas has no operation: integers, addresses, byte moves.

Only for use inside `plgpu.inline_mgpu`. A warpgroup is 128 threads: 4 warps of 32 lanes. In a wgmma fragment a lane is
known by its row group (lane // 4, 0 to 7) and its column pair (lane % 4, 0 to 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector


@dataclasses.dataclass(frozen=True)
class Int32:
    """A per-thread unsigned 32-bit integer with Python's operators."""

    value: Any

    def _with(self, operation: Any, other: Int32 | int) -> Int32:
        return Int32(operation(self.value, other.value if isinstance(other, Int32) else int32(other).value))

    def __add__(self, other: Int32 | int) -> Int32:
        return self._with(arith.addi, other)

    def __mul__(self, other: int) -> Int32:
        return self._with(arith.muli, other)

    def __floordiv__(self, other: int) -> Int32:
        return self._with(arith.divui, other)

    def __mod__(self, other: int) -> Int32:
        return self._with(arith.remui, other)

    def __and__(self, other: int) -> Int32:
        return self._with(arith.andi, other)

    def __xor__(self, other: Int32 | int) -> Int32:
        return self._with(arith.xori, other)

    def __rshift__(self, other: int) -> Int32:
        return self._with(arith.shrui, other)

    def minimum(self, other: Int32 | int) -> Int32:
        return self._with(arith.minui, other)

    def below(self, other: Int32 | int) -> Any:
        """self < other, both as signed integers: a predicate for `when`."""
        other = other if isinstance(other, Int32) else int32(other)
        return arith.cmpi(arith.CmpIPredicate.slt, self.value, other.value)

    def equals(self, other: Int32) -> Any:
        return arith.cmpi(arith.CmpIPredicate.eq, self.value, other.value)


def int32(value: int) -> Int32:
    return Int32(mgpu.c(value, ir.IntegerType.get_signless(32)))


def float32(value: float) -> Any:
    return mgpu.c(value, ir.F32Type.get())


def approximate(function: str, x: Any) -> Any:
    """The hardware's ex2, rcp or rsqrt of a float32: 2 ulp, subnormals are 0."""
    return llvm.inline_asm(ir.F32Type.get(), [x], f"{function}.approx.ftz.f32 $0, $1;", "=f,f", has_side_effects=False)


def over_lanes(value: Any, combine: Callable[[Any, Any], Any], lanes: int) -> Any:
    """A float32 of each of `lanes` (a power of two) neighbouring lanes, combined; the same in all of them.

    All of the warp must call it.
    """
    distance = 1
    while distance < lanes:
        value = combine(value, mgpu_utils.shfl_bfly(value, distance))
        distance *= 2
    return value


@dataclasses.dataclass(frozen=True)
class Thread:
    """Where this thread stands in its warpgroup: index 0 to 127, warp 0 to 3, row group 0 to 7, column pair 0 to 3."""

    index: Int32
    warp: Int32
    group: Int32
    pair: Int32


def this_thread() -> Thread:
    index = Int32(mgpu_utils.thread_idx()) % 128
    lane = index % 32
    return Thread(index, index // 32, lane // 4, lane % 4)


def unhoisted(x: Int32) -> Int32:
    """x, but what is computed from it stays inside the loop: kept out of it, it would take registers all the while."""
    move = llvm.inline_asm(words(1), [x.value], "mov.b32 $0, $1;", "=r,r", has_side_effects=True)
    return Int32(move)


def tile_offset(row_tile: Int32, row: Int32, column: Int32, row_bytes: int, swizzle: int) -> Int32:
    """Byte offset of an element in a [rows, row_bytes] buffer in tiles of 8 rows of `swizzle` bytes, swizzled.

    Args:
      row_tile: the element's row // 8; row: its row % 8; column: in bytes.
    """
    tile = row_tile * (row_bytes // swizzle) + column // swizzle
    inner = row * swizzle + column % swizzle
    # The hardware exchanges 16-byte chunks: address bits 4 to 6 take the exclusive or with bits 7 to 9, as far as the
    # swizzle is wide. A tile begins where those bits are 0.
    chunks = inner ^ ((inner >> 3) & (swizzle - 16))
    return tile * (8 * swizzle) + chunks


def pointer(ref: Any, offset: Int32) -> Any:
    """Address of the byte `offset` in a reference, or after an address."""
    return mgpu_utils.getelementptr(_begin(ref), [offset.value], ir.IntegerType.get_signless(8))


def far_pointer(ref: Any, item: Int32, item_bytes: int, offset: Int32) -> Any:
    """Address of a byte in one of many items of a reference, or after an address; they may be more than 2 GiB."""
    word, long = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(64)
    begin = arith.muli(arith.extui(long, item.value), mgpu.c(item_bytes, long))
    place = arith.addi(begin, arith.extui(long, offset.value))
    return mgpu_utils.getelementptr(_begin(ref), [place], word)


def _begin(ref: Any) -> Any:
    return mgpu_utils.memref_ptr(ref) if isinstance(ref.type, ir.MemRefType) else ref


def page_item(slot: Int32, head: Int32, kv_heads: int, page_size: int) -> Int32:
    """Which item of pages [pages, kv_heads, page_size] a token's slot, page * page_size + offset, is for a head."""
    return (slot // page_size * kv_heads + head) * page_size + slot % page_size


def words(count: int) -> Any:
    """The type of `count` 32-bit words."""
    word = ir.IntegerType.get_signless(32)
    return word if count == 1 else ir.VectorType.get((count,), word)


def zero_words(count: int) -> Any:
    return vector.broadcast(words(count), int32(0).value)


def load_words(ref: Any, offset: Int32, nbytes: int) -> list[Any]:
    """nbytes (2, 4, 8 or 16) at a byte offset, as 32-bit words; a 2-byte load fills the low half of one."""
    if nbytes == 2:
        half = llvm.load(ir.IntegerType.get_signless(16), pointer(ref, offset))
        return [arith.extui(words(1), half)]
    loaded = llvm.load(words(nbytes // 4), pointer(ref, offset))
    if nbytes == 4:
        return [loaded]
    return [llvm.extractelement(loaded, int32(i).value) for i in range(nbytes // 4)]


def assembly(text: str, operands: list[Any], outputs: int = 1) -> list[Any]:
    """Results of a piece of PTX without side effects whose outputs and operands are 32-bit words."""
    constraints = ",".join(["=r"] * outputs + ["r"] * len(operands))
    kind = words(1) if outputs == 1 else llvm.StructType.get_literal([words(1)] * outputs)
    result: Any = llvm.inline_asm(kind, operands, text, constraints, has_side_effects=False)
    return [result] if outputs == 1 else [llvm.extractvalue(words(1), result, [i]) for i in range(outputs)]


def interleave_halves(low: Any, high: Any) -> list[Any]:
    """Two words of two 16-bit elements each: (low[0], high[0]) and (low[1], high[1])."""
    return [assembly(f"prmt.b32 $0, $1, $2, {selector};", [low, high])[0] for selector in ("0x5410", "0x7632")]


def widen_float8(word: Any, high: Any | None = None) -> list[Any]:
    """Two words of float16 from float8_e4m3fn bytes.

    Returns: of word's bytes 0, 1 and 2, 3; with `high`: of (word's byte 0, high's byte 0) and (byte 1, byte 1).
    """
    operands = [word] if high is None else [word, high]
    gather = "mov.b32 both, $2;" if high is None else "prmt.b32 both, $2, $3, 0x5140;"
    return assembly(
        "{ .reg .b32 both; .reg .b16 low, up; "
        + gather
        + " mov.b32 {low, up}, both; cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, up; }",
        operands,
        outputs=2,
    )


def widen_float8_to_bfloat16(word: Any) -> list[Any]:
    """Two words of bfloat16 from a word of float8_e4m3fn: bytes 0, 1 and bytes 2, 3. NaN becomes 480.

    The bits of an e4m3 number, moved to a bfloat16's place, are that number times 2^-120; subnormals too.
    """
    return [
        assembly(
            "{ .reg .b32 both, low, sign; "
            f"prmt.b32 both, $1, 0, {selector}; "
            "shr.u32 low, both, 4; and.b32 low, low, 0x07f007f0; and.b32 sign, both, 0x80008000; "
            "or.b32 low, low, sign; mov.b32 sign, 0x7b807b80; mul.rn.bf16x2 $0, low, sign; }",
            [word],
        )[0]
        for selector in ("0x1404", "0x3424")
    ]
