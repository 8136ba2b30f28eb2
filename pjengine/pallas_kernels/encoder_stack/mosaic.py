"""All layers of a post-norm encoder for 16 tokens in one launch, on Hopper.

Few tokens leave the time to launches and to waits between them: here a block per SM keeps 8 columns of every product
and streams their weights (packing.py) through a ring in shared memory, ahead of the four barriers of the grid that a
layer has. Activations pass from block to block through the L2 cache:

    qkv = x @ qkv | barrier | o of attention, + x | barrier | norm, up, GELU | barrier | down, + x | barrier | norm

Norms are computed by every block for itself. A warp per head: its attention, and of each product a head's share of
the inner dimension; warps then add their sums through shared memory, in one order, so results are the same each time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pjengine.pallas_kernels.encoder_stack import packing
from pjengine.pallas_kernels.encoder_stack.api import TOKENS
from pjengine.pallas_kernels.encoder_stack.packing import CHUNKS, COLUMNS, PackedLayers
from pjengine.pallas_kernels.mosaic_common import LOG2E, MASKED, launch
from pjengine.pallas_kernels.registers import (
    Int32,
    far_pointer,
    int32,
    interleave_halves,
    load_words,
    pointer,
    this_thread,
    words,
)
from pjengine.pallas_kernels.warp_code import (
    Sums,
    arrive_at_grid,
    block_barrier,
    bring_to_l2,
    copy_bulk,
    from_bfloat16_pair,
    init_copy_barriers,
    leave_grid,
    load_past_l1,
    multiply,
    no_sums,
    to_bfloat16_pair,
    wait_copied,
    wait_for_grid,
)

_AHEAD = 5  # chunks that are fetched beforehand
_SHARED_BYTES = 225 * 1024  # of a block, beside `small` and what Mosaic takes, 1 KiB each
_LINE = 128  # bytes of a line of the L2 cache
_BARRIERS = 4  # of the grid in a layer
_PAIRS = TOKENS * COLUMNS // 2  # of neighbouring results in a chunk


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Sizes of the model, static; `row` is the bytes of a row of 16-bit x in shared memory, 64 more than a multiple
    of 128 so that the rows of eight lanes' loads lie in different banks.
    """

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
        return 2 * self.hidden + 64

    @property
    def partial(self) -> int:
        """Bytes of the warps' sums of up to four chunks."""
        return self.heads * 4 * _PAIRS * 8

    @property
    def slots(self) -> int:
        """Of the ring: as many chunks, at most a layer's, as there is room for beside x and sums."""
        return min(CHUNKS, (_SHARED_BYTES - TOKENS * self.row - self.partial) // self.chunk)


def encoder_layers(x: jax.Array, query_starts: jax.Array, packed: PackedLayers, *, eps: float) -> jax.Array:
    """See `encoder_stack`."""
    layers, _, hidden = packed.norms.shape
    return _launch(x, query_starts, packed, shape=_Shape(layers, hidden, packed.heads, eps))


@functools.partial(jax.jit, static_argnames="shape")
def _launch(x: jax.Array, query_starts: jax.Array, packed: PackedLayers, *, shape: _Shape) -> jax.Array:
    def rows(width: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((TOKENS, width), x.dtype)

    out, *_ = launch(
        functools.partial(_kernel, shape=shape),
        (x, query_starts, packed.weights, packed.biases, packed.norms, packed.counter),
        out_type=tuple(rows(n * shape.hidden) for n in (1, 3, 1, 4)),
        scratch=dict(
            ring=plgpu.SMEM((shape.slots * shape.chunk // 2,), x.dtype),
            partial=plgpu.SMEM((shape.partial // 4,), jnp.float32),
            rows=plgpu.SMEM((TOKENS * shape.row // 2,), x.dtype),
            small=plgpu.SMEM((2 * shape.slots + TOKENS + 1,), jnp.int32),
        ),
        grid={"block": shape.blocks},
        warpgroups=shape.heads // 4,
        name="encoder_stack",
    )
    return out


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What the parts of the kernel share; references, and where this thread stands."""

    shape: _Shape
    refs: dict[str, Any]
    block: Int32
    thread: Int32  # of the block
    warp: Int32  # of the block
    lane: Int32
    group: Int32
    pair: Int32

    def __getitem__(self, name: str) -> Any:
        return self.refs[name]


_NAMES = ("x", "starts", "weights", "biases", "norms", "counter", "out", "qkv", "y", "h")
_SCRATCH = ("ring", "partial", "rows", "small")  # small: barriers of 8 bytes, text of each token, number of tokens


def _kernel(*refs: Any, shape: _Shape, **scratch: Any) -> None:
    names = (*_NAMES, *_SCRATCH)
    arrays = (*refs, *(scratch[name] for name in _SCRATCH))
    kinds = (*[plgpu.RefType()] * len(arrays), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
    block = lax.axis_index("block")

    def run(part: Callable[[_Kernel, Int32], None], layer: jax.Array) -> None:
        @plgpu.inline_mgpu(arg_types=kinds)
        def inlined(ctx: Any, *operands: Any) -> None:
            *given, block, layer = operands
            thread = this_thread()
            index = Int32(mgpu_utils.thread_idx())
            known = dict(zip(names, given, strict=True))
            place = (Int32(block.registers.item()), index, index // 32, index % 32, thread.group, thread.pair)
            part(_Kernel(shape, known, *place), Int32(layer.registers.item()))

        inlined(*arrays, block, layer)

    run(_start, jnp.int32(0))
    lax.fori_loop(0, shape.layers, lambda layer, _: run(_layer, layer), None)
    run(_finish, jnp.int32(0))


def _start(k: _Kernel, layer: Int32) -> None:
    """Begins the first copies, finds each token's text and their number, and brings x to shared memory."""
    with mgpu_utils.when(k.thread.below(1)):
        init_copy_barriers(k["small"], k.shape.slots)
    block_barrier()
    for chunk in range(_AHEAD):
        _fetch(k, layer, chunk)
    with mgpu_utils.when(k.thread.below(TOKENS)):
        segment = int32(0)
        (texts,) = ir.MemRefType(k["starts"].type).shape
        for i in range(1, texts):
            start = Int32(llvm.load(words(1), pointer(k["starts"], int32(4 * i))))
            ended = arith.cmpi(arith.CmpIPredicate.sle, start.value, k.thread.value)
            segment = segment + Int32(arith.extui(words(1), ended))
        llvm.store(segment.value, pointer(k["small"], k.thread * 4 + 8 * k.shape.slots))
        # `start` is the last text's end: the tokens that are not padding.
        llvm.store(start.value, pointer(k["small"], int32(8 * k.shape.slots + 4 * TOKENS)))
    per_row = 2 * k.shape.hidden // 16
    for first in range(0, TOKENS * per_row, 32 * k.shape.heads):
        place = k.thread + first
        with mgpu_utils.when(place.below(TOKENS * per_row)):
            value = llvm.load(words(4), pointer(k["x"], place * 16))
            llvm.store(value, pointer(k["rows"], place // per_row * k.shape.row + place % per_row * 16))
    block_barrier()


def _layer(k: _Kernel, layer: Int32) -> None:
    hidden, block = k.shape.hidden, k.block * COLUMNS

    def store_qkv(row: Int32, column: Int32, low: Any, high: Any) -> None:
        _store(k["qkv"], 3 * hidden, row, column, low, high)

    def store_up(row: Int32, column: Int32, low: Any, high: Any) -> None:
        _store(k["h"], 4 * hidden, row, column, _gelu(low), _gelu(high))

    def store_sum(row: Int32, column: Int32, low: Any, high: Any) -> None:
        (word,) = load_words(k["rows"], row * k.shape.row + column * 2, 4)
        before = from_bfloat16_pair(word)
        _store(k["y"], hidden, row, column, arith.addf(low, before[0]), arith.addf(high, before[1]))

    _bring_small(k, layer + 1)
    at_qkv, at_output, at_up, at_down = (
        _Places(packing.QKV, block, hidden, 0),
        _Places(packing.OUTPUT, block, 0, 3 * hidden),
        _Places(packing.UP, block * 4, COLUMNS, 4 * hidden),
        _Places(packing.DOWN, block, 0, 8 * hidden),
    )
    qkv_bias, output_bias, up_bias, down_bias = (_bias(k, layer, at) for at in (at_qkv, at_output, at_up, at_down))

    x = _rows_of_warp(k)
    _fetch(k, layer, 5)
    sums = [_multiply_chunk(k, layer, chunk, x, no_sums()) for chunk in range(3)]
    _reduce(k, layer, at_qkv, sums, qkv_bias, store_qkv)
    _meet(k, layer, 0)
    attended = _attention(k)
    _fetch(k, layer, 8)
    sums = [_multiply_chunk(k, layer, 3, attended, no_sums())]
    _reduce(k, layer, at_output, sums, output_bias, store_sum)
    affine = _affine(k, layer, 0)
    _meet(k, layer, 1)
    _norm(k, affine)
    _fetch(k, layer, 11)
    x = _rows_of_warp(k)
    sums = [_multiply_chunk(k, layer, 4 + i, x, no_sums()) for i in range(4)]
    _reduce(k, layer, at_up, sums, up_bias, store_up)
    _meet(k, layer, 2)
    total = no_sums()
    for i, part in enumerate([_part_of_h(k, i) for i in range(4)]):
        total = _multiply_chunk(k, layer, 8 + i, part, total)
        if i == 0:
            _fetch(k, layer, 14)
    _reduce(k, layer, at_down, [total], down_bias, store_sum)
    affine = _affine(k, layer, 2)
    _meet(k, layer, 3)
    _norm(k, affine)


def _finish(k: _Kernel, layer: Int32) -> None:
    """Each block writes its columns of the last layer's result."""
    with mgpu_utils.when(k.thread.below(TOKENS)):
        value = llvm.load(words(4), pointer(k["rows"], k.thread * k.shape.row + k.block * (2 * COLUMNS)))
        llvm.store(value, pointer(k["out"], k.thread * (2 * k.shape.hidden) + k.block * (2 * COLUMNS)))
    with mgpu_utils.when(k.thread.below(1)):
        leave_grid(k["counter"], (_BARRIERS * k.shape.layers + 1) * k.shape.blocks)


def _fetch(k: _Kernel, layer: Int32, chunk: int) -> None:
    """Begins the copy of a chunk of this layer, or of the next one from CHUNKS on, to its slot, which nobody reads."""
    shape, its_layer = k.shape, layer + chunk // CHUNKS
    # The last warp has nothing to write, and is not the one that waits for the grid.
    chosen = arith.andi(k.thread.equals(int32(32 * (shape.heads - 1))), its_layer.below(shape.layers))
    with mgpu_utils.when(chosen):
        item = (its_layer * shape.blocks + k.block) * CHUNKS + chunk % CHUNKS
        source = far_pointer(k["weights"], item, shape.chunk, int32(0))
        slot, _ = _slot(k, layer, chunk)
        copy_bulk(source, k["ring"], slot * shape.chunk, shape.chunk, k["small"], slot)


def _slot(k: _Kernel, layer: Int32, chunk: int) -> tuple[Int32, Int32]:
    """Where a chunk is in the ring, and the parity of its turn there."""
    turn = layer * CHUNKS + chunk
    return turn % k.shape.slots, turn // k.shape.slots & 1


def _bring_small(k: _Kernel, layer: Int32) -> None:
    """A layer's biases and norms to the L2 cache, so that nobody waits for the memory: each block brings a few lines."""
    hidden, reach = k.shape.hidden, k.shape.blocks * _LINE
    with mgpu_utils.when(arith.andi(k.thread.below(1), layer.below(k.shape.layers))):
        for name, nbytes in (("biases", 18 * hidden), ("norms", 8 * hidden)):
            for first in range(0, nbytes, reach):
                place = k.block * _LINE + first
                with mgpu_utils.when(place.below(nbytes)):
                    bring_to_l2(pointer(k[name], layer * nbytes + place))


def _meet(k: _Kernel, layer: Int32, index: int) -> None:
    """All blocks wait for one another; what they wrote before is in the L2 cache behind it."""
    block_barrier()
    with mgpu_utils.when(k.thread.below(1)):
        arrive_at_grid(k["counter"])
        wait_for_grid(k["counter"], (layer * _BARRIERS + (index + 1)) * k.shape.blocks)
    _fetch(k, layer, 3 * index + _AHEAD + 2)
    block_barrier()


def _multiply_chunk(k: _Kernel, layer: Int32, chunk: int, left: list[list[Any]], sums: Sums) -> Sums:
    """sums + this warp's part of the inner dimension times a chunk. left: as of `_operands`, for each 16 of it."""
    slot, parity = _slot(k, layer, chunk)
    wait_copied(k["small"], slot, parity)
    first = slot * k.shape.chunk + k.lane * 16
    for step in range(k.shape.head_dim // 32):
        right = load_words(k["ring"], first + (k.warp * (k.shape.head_dim // 32) + step) * 512, 16)
        sums = multiply(sums, left[2 * step], right[:2])
        sums = multiply(sums, left[2 * step + 1], right[2:])
    return sums


def _operands(upper: list[Any], lower: list[Any]) -> list[list[Any]]:
    """Left operands of the rows g and g + 8, of which a lane has all words of its columns in order."""
    return [[upper[i], lower[i], upper[i + 1], lower[i + 1]] for i in range(0, len(upper), 2)]


def _rows_of_warp(k: _Kernel) -> list[list[Any]]:
    """The warp's columns of x in shared memory, as left operands."""
    places = [k.warp * (2 * k.shape.head_dim) + 64 * step + k.pair * 16 for step in range(k.shape.head_dim // 32)]
    upper, lower = (
        [word for place in places for word in load_words(k["rows"], row * k.shape.row + place, 16)]
        for row in (k.group, k.group + 8)
    )
    return _operands(upper, lower)


def _part_of_h(k: _Kernel, part: int) -> list[list[Any]]:
    """A quarter of the warp's columns of h, as left operands."""
    first = (k.warp * 4 + part) * (2 * k.shape.head_dim) + k.pair * 16
    upper, lower = (
        [
            word
            for step in range(k.shape.head_dim // 32)
            for word in _load_row(k, "h", row, row * (8 * k.shape.hidden) + first + 64 * step, 16)
        ]
        for row in (k.group, k.group + 8)
    )
    return _operands(upper, lower)


def _load_row(k: _Kernel, name: str, row: Int32, place: Int32, nbytes: int) -> list[Any]:
    """Words of a row that other blocks wrote; zeros of padding."""
    real = Int32(llvm.load(words(1), pointer(k["small"], int32(8 * k.shape.slots + 4 * TOKENS))))
    return load_past_l1(pointer(k[name], place), nbytes, arith.cmpi(arith.CmpIPredicate.slt, row.value, real.value))


@dataclasses.dataclass(frozen=True)
class _Places:
    """A product's chunks, the first of its block's columns, from there to the next chunk's, and its biases' offset."""

    chunks: tuple[int, int]
    column: Int32
    stride: int
    bias: int

    @property
    def refill(self) -> int:
        return {packing.QKV: 6, packing.OUTPUT: 9, packing.UP: 12, packing.DOWN: 15}[self.chunks]

    @property
    def columns(self) -> int:
        return 3 if self.chunks == packing.QKV else 4 if self.chunks == packing.UP else 1

    def of(self, index: Int32) -> tuple[Int32, Int32]:
        """Row and first column of a pair of neighbouring results."""
        inside = index % _PAIRS
        return inside // 4, self.column + index // _PAIRS * self.stride + inside % 4 * 2


def _bias(k: _Kernel, layer: Int32, at: _Places) -> Any:
    """Of the two results that this thread will write."""
    _, column = at.of(k.thread.minimum(at.columns * _PAIRS - 1))
    return llvm.load(words(1), pointer(k["biases"], (layer * (9 * k.shape.hidden) + column + at.bias) * 2))


def _reduce(
    k: _Kernel,
    layer: Int32,
    at: _Places,
    sums: list[Sums],
    bias: Any,
    write: Callable[[Int32, Int32, Any, Any], None],
) -> None:
    """Adds up what the warps have of each 8 columns, and the bias; a thread writes two neighbouring results.

    Args:
      at: the product's places.
      write: called with row, column and two float32.
    """
    count, pair_type = len(sums), ir.VectorType.get((2,), ir.F32Type.get())
    for i, (low, high, low8, high8) in enumerate(sums):
        place = ((k.warp * count + i) * _PAIRS + k.group * 4 + k.pair) * 8
        for offset, values in ((0, (low, high)), (_PAIRS * 4, (low8, high8))):
            value = llvm.mlir_undef(pair_type)
            for j, element in enumerate(values):
                value = llvm.insertelement(value, element, int32(j).value)
            llvm.store(value, pointer(k["partial"], place + offset))
    block_barrier()
    _fetch(k, layer, at.refill)
    with mgpu_utils.when(k.thread.below(count * _PAIRS)):
        row, column = at.of(k.thread)
        low, high = from_bfloat16_pair(bias)
        for warp in range(k.shape.heads):
            value = llvm.load(pair_type, pointer(k["partial"], k.thread * 8 + warp * count * _PAIRS * 8))
            low = arith.addf(low, llvm.extractelement(value, int32(0).value))
            high = arith.addf(high, llvm.extractelement(value, int32(1).value))
        write(row, column, low, high)


def _store(ref: Any, width: int, row: Int32, column: Int32, low: Any, high: Any) -> None:
    llvm.store(to_bfloat16_pair(low, high), pointer(ref, (row * width + column) * 2))


def _attention(k: _Kernel) -> list[list[Any]]:
    """The warp's head: left operands of the output product, in the order of `packing.attended_rows`."""
    hidden, head_dim = k.shape.hidden, k.shape.head_dim

    def load(part: int, row: Int32, nbytes: int, lane: Int32) -> list[Any]:
        first = row * (6 * hidden) + 2 * part * hidden + k.warp * (2 * head_dim) + lane * nbytes
        size = min(nbytes, 16)
        return [w for i in range(0, nbytes, size) for w in _load_row(k, "qkv", row, first + i, size)]

    # Queries and keys are cut alike: a lane has a quarter of the head's dimensions, in whatever order.
    low_rows, high_rows = k.group, k.group + 8
    upper, lower, *keys = (load(part, row, head_dim // 2, k.pair) for part in (0, 1) for row in (low_rows, high_rows))
    seen = [k.pair * 2 + i for i in (0, 1, 8, 9)]
    values = [load(2, row, head_dim // 4, k.group) for row in seen]
    scores = [no_sums(), no_sums()]
    for step, left in enumerate(_operands(upper, lower)):
        for half in range(2):
            scores[half] = multiply(scores[half], left, keys[half][2 * step : 2 * step + 2])

    def segment(row: Int32) -> Int32:
        return Int32(llvm.load(words(1), pointer(k["small"], row * 4 + 8 * k.shape.slots)))

    key_segments = [segment(row) for row in seen]
    factor, masked = _constant(LOG2E * head_dim**-0.5), _constant(MASKED)
    weights, inverses = [], []
    for r, row in enumerate((low_rows, high_rows)):
        own = segment(row)
        row_scores = [scores[i // 2][2 * r + i % 2] for i in range(4)]
        row_scores = [
            arith.select(own.equals(other), arith.mulf(score, factor), masked)
            for score, other in zip(row_scores, key_segments, strict=True)
        ]
        top = _over_pairs(functools.reduce(arith.maximumf, row_scores), arith.maximumf)
        row_weights = [_approximate("ex2", arith.subf(score, top)) for score in row_scores]
        total = _over_pairs(functools.reduce(arith.addf, row_weights), arith.addf)
        inverses.append(_approximate("rcp", total))
        weights.append([to_bfloat16_pair(row_weights[i], row_weights[i + 1]) for i in (0, 2)])
    left = [weights[0][0], weights[1][0], weights[0][1], weights[1][1]]
    # Two keys of a dimension in a word: of the lane's dimensions 0 to head_dim / 8, which are as many tiles.
    halves = [interleave_halves(a, b) for a, b in zip(values[0], values[1], strict=True)]
    far_halves = [interleave_halves(a, b) for a, b in zip(values[2], values[3], strict=True)]
    attended = []
    for near, far in zip(sum(halves, []), sum(far_halves, []), strict=True):
        tile = multiply(no_sums(), left, [near, far])
        scaled = [arith.mulf(value, inverses[i // 2]) for i, value in enumerate(tile)]
        attended.append((to_bfloat16_pair(*scaled[:2]), to_bfloat16_pair(*scaled[2:])))
    return [[*attended[i], *attended[i + 1]] for i in range(0, len(attended), 2)]


def _over_pairs(value: Any, operation: Callable[[Any, Any], Any]) -> Any:
    """Of the four lanes that share a row."""
    for distance in (1, 2):
        value = operation(value, mgpu_utils.shfl_bfly(value, distance))
    return value


def _row_places(k: _Kernel) -> tuple[int, list[Int32]]:
    """Size and offsets of the vectors that a lane has of a row of `hidden` elements, in bytes."""
    nbytes = 16 if k.shape.hidden % 256 == 0 else 8
    return nbytes, [(k.lane + 32 * i) * nbytes for i in range(2 * k.shape.hidden // (32 * nbytes))]


def _affine(k: _Kernel, layer: Int32, index: int) -> list[list[Any]]:
    """Words of a norm's weight and bias that this lane multiplies by and adds. index: in `PackedLayers.norms`."""
    nbytes, places = _row_places(k)
    return [
        [w for place in places for w in load_words(k["norms"], (layer * 4 + i) * (2 * k.shape.hidden) + place, nbytes)]
        for i in (index, index + 1)
    ]


def _norm(k: _Kernel, affine: list[list[Any]]) -> None:
    """Layer norm of y's rows to shared memory; a warp takes a row. Padding's rows are the bias."""
    shape = k.shape
    nbytes, places = _row_places(k)
    weight, bias = ([value for word in part for value in from_bfloat16_pair(word)] for part in affine)
    for first in range(0, TOKENS, shape.heads):
        row = k.warp + first
        with mgpu_utils.when(row.below(TOKENS)):
            loaded = [_load_row(k, "y", row, row * (2 * shape.hidden) + place, nbytes) for place in places]
            values = [value for part in loaded for word in part for value in from_bfloat16_pair(word)]
            mean = _mean(values, shape.hidden)
            values = [arith.subf(value, mean) for value in values]
            variance = _mean([arith.mulf(value, value) for value in values], shape.hidden)
            inverse = _approximate("rsqrt", arith.addf(variance, _constant(shape.eps)))
            results = [
                arith.addf(arith.mulf(arith.mulf(value, inverse), w), b)
                for value, w, b in zip(values, weight, bias, strict=True)
            ]
            each = nbytes // 2
            for i, place in enumerate(places):
                mine = results[i * each : (i + 1) * each]
                packed = llvm.mlir_undef(words(each // 2))
                for j in range(0, each, 2):
                    packed = llvm.insertelement(packed, to_bfloat16_pair(mine[j], mine[j + 1]), int32(j // 2).value)
                llvm.store(packed, pointer(k["rows"], row * shape.row + place))
    block_barrier()


def _mean(values: list[Any], count: int) -> Any:
    """Of all values that the lanes of a warp hold."""
    total = functools.reduce(arith.addf, values)
    for distance in (1, 2, 4, 8, 16):
        total = arith.addf(total, mgpu_utils.shfl_bfly(total, distance))
    return arith.mulf(total, _constant(1.0 / count))


def _gelu(x: Any) -> Any:
    """x * Phi(x), with erfc by Abramowitz and Stegun's 7.1.26, whose error is 1.5e-7."""
    size = arith.mulf(_absolute(x), _constant(math.sqrt(0.5)))
    t = _approximate("rcp", arith.addf(arith.mulf(size, _constant(0.3275911)), _constant(1.0)))
    series = _constant(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = arith.addf(arith.mulf(series, t), _constant(coefficient))
    bell = _approximate("ex2", arith.mulf(arith.mulf(size, size), _constant(-LOG2E)))
    tail = arith.mulf(arith.mulf(arith.mulf(series, t), bell), _constant(0.5))
    positive = arith.cmpf(arith.CmpFPredicate.OGE, x, _constant(0.0))
    return arith.mulf(x, arith.select(positive, arith.subf(_constant(1.0), tail), tail))


def _absolute(x: Any) -> Any:
    return arith.maximumf(x, arith.negf(x))


def _approximate(function: str, x: Any) -> Any:
    """The hardware's ex2, rcp or rsqrt of a float32: 2 ulp, subnormals are 0."""
    return llvm.inline_asm(ir.F32Type.get(), [x], f"{function}.approx.ftz.f32 $0, $1;", "=f,f", has_side_effects=False)


def _constant(value: float) -> Any:
    return mgpu.c(value, ir.F32Type.get())
