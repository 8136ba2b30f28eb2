"""What a block of the encoder's kernel does with its columns: weights through the ring, products, sums, barriers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pjengine.pallas_kernels.encoder_stack.api import TOKENS
from pjengine.pallas_kernels.encoder_stack.packing import CHUNKS, COLUMNS
from pjengine.pallas_kernels.registers import Int32, far_pointer, int32, load_words, pointer, words
from pjengine.pallas_kernels.warp_code import (
    Sums,
    arrive_at_grid,
    block_barrier,
    bring_to_l2,
    copy_bulk,
    from_bfloat16_pair,
    load_past_l1,
    multiply,
    to_bfloat16_pair,
    wait_copied,
    wait_for_grid,
)

Left = list[list[Any]]  # left operands of a lane, four words for each 16 of the inner dimension

# Chunks that are fetched beforehand. After that a layer fetches one at a time, three between two barriers: more at once
# keep the memory busy, and loads that all blocks wait for stand behind them.
AHEAD = 5
_SHARED_BYTES = 225 * 1024  # of a block, beside `small` and what Mosaic takes, 1 KiB each
_LINE = 128  # bytes of a line of the L2 cache
_BARRIERS = 4  # of the grid in a layer
_PAIRS = TOKENS * COLUMNS // 2  # of neighbouring results in a chunk


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model, static; and from them, in bytes, those of the kernel."""

    layers: int
    hidden: int
    heads: int
    eps: float

    @property
    def blocks(self) -> int:
        return self.hidden // COLUMNS

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def chunk(self) -> int:
        return 2 * COLUMNS * self.hidden

    @property
    def row(self) -> int:
        """Of x in shared memory; 64 more than a multiple of 128, so that the rows of a load lie in different banks."""
        return 2 * self.hidden + 64

    @property
    def partial(self) -> int:
        """The warps' sums of up to four chunks."""
        return self.heads * 4 * _PAIRS * 8

    @property
    def slots(self) -> int:
        """Of the ring, in chunks: what there is room for, up to a layer; ten at least, which is what `AHEAD` needs."""
        return min(CHUNKS, (_SHARED_BYTES - TOKENS * self.row - self.partial) // self.chunk)

    @property
    def segments_at(self) -> int:
        """Where `small` has each token's text, behind the barriers of the slots."""
        return 8 * self.slots

    @property
    def tokens_at(self) -> int:
        """Where `small` has the number of tokens that are no padding."""
        return self.segments_at + 4 * TOKENS

    @property
    def small(self) -> int:
        return self.tokens_at + 4

    @property
    def meetings(self) -> int:
        """Arrivals of all blocks at all barriers of the grid."""
        return _BARRIERS * self.layers * self.blocks


@dataclasses.dataclass(frozen=True)
class Block:
    """References by name, and where this thread stands: block, thread and warp of the block, lane of the warp."""

    shape: Shape
    refs: dict[str, Any]
    index: Int32
    thread: Int32
    warp: Int32
    lane: Int32
    group: Int32
    pair: Int32

    def __getitem__(self, name: str) -> Any:
        return self.refs[name]


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a product's results belong.

    Attributes:
      count: of eights of columns in a block; column: the first; stride: from one eight to the next.
      bias: offset of the product's biases.
    """

    count: int
    column: Int32
    stride: int
    bias: int

    def of(self, index: Int32) -> tuple[Int32, Int32]:
        """Row and first column of a pair of neighbouring results."""
        inside = index % _PAIRS
        return inside // 4, self.column + index // _PAIRS * self.stride + inside % 4 * 2


def fetch(block: Block, layer: Int32, chunk: int) -> None:
    """Begins the copy of a chunk of this layer, or of the next one from CHUNKS on, to its slot, which nobody reads."""
    shape, its_layer = block.shape, layer + chunk // CHUNKS
    # The last warp has nothing to write, and is not the one that waits for the grid.
    chosen = arith.andi(block.thread.equals(int32(32 * (shape.heads - 1))), its_layer.below(shape.layers))
    with mgpu_utils.when(chosen):
        item = (its_layer * shape.blocks + block.index) * CHUNKS + chunk % CHUNKS
        source = far_pointer(block["weights"], item, shape.chunk, int32(0))
        slot, _ = _slot(shape, layer, chunk)
        copy_bulk(source, block["ring"], slot * shape.chunk, shape.chunk, block["small"], slot)


def _slot(shape: Shape, layer: Int32, chunk: int) -> tuple[Int32, Int32]:
    """Where a chunk is in the ring, and the parity of its turn there."""
    turn = layer * CHUNKS + chunk
    return turn % shape.slots, turn // shape.slots & 1


def bring_small(block: Block, layer: Int32) -> None:
    """A layer's biases and norms to the L2 cache, so that nobody waits for the memory: a few lines by each block."""
    hidden, reach = block.shape.hidden, block.shape.blocks * _LINE
    with mgpu_utils.when(arith.andi(block.thread.below(1), layer.below(block.shape.layers))):
        for name, nbytes in (("biases", 18 * hidden), ("norms", 8 * hidden)):
            for first in range(0, nbytes, reach):
                place = block.index * _LINE + first
                with mgpu_utils.when(place.below(nbytes)):
                    bring_to_l2(pointer(block[name], layer * nbytes + place))


def meet(block: Block, layer: Int32, barrier: int, *, following: int) -> None:
    """All blocks wait for one another; what they wrote before is in the L2 cache behind it. following: to fetch."""
    block_barrier()
    with mgpu_utils.when(block.thread.below(1)):
        arrive_at_grid(block["counter"])
        wait_for_grid(block["counter"], (layer * _BARRIERS + (barrier + 1)) * block.shape.blocks)
    fetch(block, layer, following)
    block_barrier()


def multiply_chunk(block: Block, layer: Int32, chunk: int, left: Left, sums: Sums) -> Sums:
    """sums + this warp's part of the inner dimension times a chunk."""
    slot, parity = _slot(block.shape, layer, chunk)
    wait_copied(block["small"], slot, parity)
    steps = block.shape.head_dim // 32
    first = slot * block.shape.chunk + (block.warp * (steps * 32) + block.lane) * 16
    for step in range(steps):
        right = load_words(block["ring"], first + 512 * step, 16)
        sums = multiply(sums, left[2 * step], right[:2])
        sums = multiply(sums, left[2 * step + 1], right[2:])
    return sums


def left_operands(upper: list[Any], lower: list[Any]) -> Left:
    """Of the rows g and g + 8, of which a lane has all words of its columns in order."""
    return [[upper[i], lower[i], upper[i + 1], lower[i + 1]] for i in range(0, len(upper), 2)]


def columns_of_rows(block: Block) -> Left:
    """The warp's columns of x in shared memory."""
    first = block.warp * (2 * block.shape.head_dim) + block.pair * 16
    upper, lower = (
        [
            word
            for step in range(block.shape.head_dim // 32)
            for word in load_words(block["rows"], row * block.shape.row + first + 64 * step, 16)
        ]
        for row in (block.group, block.group + 8)
    )
    return left_operands(upper, lower)


def columns_of_h(block: Block, part: int) -> Left:
    """A quarter of the warp's columns of h."""
    first = (block.warp * 4 + part) * (2 * block.shape.head_dim) + block.pair * 16
    upper, lower = (
        [
            word
            for step in range(block.shape.head_dim // 32)
            for word in load_row(block, "h", row, row * (8 * block.shape.hidden) + first + 64 * step, 16)
        ]
        for row in (block.group, block.group + 8)
    )
    return left_operands(upper, lower)


def load_row(block: Block, name: str, row: Int32, place: Int32, nbytes: int) -> list[Any]:
    """Words of a row that other blocks wrote; zeros of padding, which saves a load and keeps it finite."""
    tokens = Int32(llvm.load(words(1), pointer(block["small"], int32(block.shape.tokens_at))))
    real = arith.cmpi(arith.CmpIPredicate.slt, row.value, tokens.value)
    return load_past_l1(pointer(block[name], place), nbytes, real)


def first_bias(block: Block, layer: Int32, at: Places) -> Any:
    """Of the two results that this thread will write, as a word."""
    _, column = at.of(block.thread.minimum(at.count * _PAIRS - 1))
    return llvm.load(words(1), pointer(block["biases"], (layer * (9 * block.shape.hidden) + column + at.bias) * 2))


def reduce(
    block: Block,
    layer: Int32,
    at: Places,
    sums: list[Sums],
    bias: Any,
    write: Callable[[Int32, Int32, Any, Any], None],
    *,
    following: int,
) -> None:
    """Adds up what the warps have of each eight columns, and the bias; a thread writes two neighbouring results.

    Args:
      write: called with row, column and two float32.
      following: chunk to fetch.
    """
    pair_type = ir.VectorType.get((2,), ir.F32Type.get())
    for i, (low, high, low8, high8) in enumerate(sums):
        place = ((block.warp * at.count + i) * _PAIRS + block.group * 4 + block.pair) * 8
        for offset, values in ((0, (low, high)), (_PAIRS * 4, (low8, high8))):
            value = llvm.mlir_undef(pair_type)
            for j, element in enumerate(values):
                value = llvm.insertelement(value, element, int32(j).value)
            llvm.store(value, pointer(block["partial"], place + offset))
    block_barrier()
    fetch(block, layer, following)
    with mgpu_utils.when(block.thread.below(at.count * _PAIRS)):
        row, column = at.of(block.thread)
        low, high = from_bfloat16_pair(bias)
        for warp in range(block.shape.heads):
            place = block.thread * 8 + warp * at.count * _PAIRS * 8
            value = llvm.load(pair_type, pointer(block["partial"], place))
            low = arith.addf(low, llvm.extractelement(value, int32(0).value))
            high = arith.addf(high, llvm.extractelement(value, int32(1).value))
        write(row, column, low, high)


def store_pair(ref: Any, width: int, row: Int32, column: Int32, low: Any, high: Any) -> None:
    """Two neighbouring results, float32, to ref [16, width]."""
    llvm.store(to_bfloat16_pair(low, high), pointer(ref, (row * width + column) * 2))
