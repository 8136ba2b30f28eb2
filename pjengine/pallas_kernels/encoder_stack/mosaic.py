"""All layers of a post-norm encoder for 16 tokens in one launch, on Hopper.

Few tokens leave the time to launches and to waits between them: here a block per SM keeps 8 columns of every product
and streams their weights (packing.py) through a ring in shared memory, ahead of the four barriers of the grid that a
layer has. Activations pass from block to block through the L2 cache:

    qkv = x @ qkv | barrier | o of attention, + x | barrier | norm, up, GELU | barrier | down, + x | barrier | norm

Norms are computed by every block for itself. A warp per head: its attention, and of each product a head's share of
the inner dimension; warps then add their sums through shared memory, in one order, so results are the same each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pjengine.pallas_kernels.encoder_stack.api import TOKENS
from pjengine.pallas_kernels.encoder_stack.attention import attention
from pjengine.pallas_kernels.encoder_stack.block import (
    AHEAD,
    Block,
    Places,
    Shape,
    bring_small,
    columns_of_h,
    columns_of_rows,
    fetch,
    first_bias,
    meet,
    multiply_chunk,
    reduce,
    store_pair,
)
from pjengine.pallas_kernels.encoder_stack.packing import COLUMNS, PackedLayers
from pjengine.pallas_kernels.encoder_stack.pointwise import affine, gelu, norm
from pjengine.pallas_kernels.mosaic_common import launch
from pjengine.pallas_kernels.registers import Int32, int32, load_words, pointer, this_thread, words
from pjengine.pallas_kernels.warp_code import (
    block_barrier,
    from_bfloat16_pair,
    init_copy_barriers,
    leave_grid,
    no_sums,
)

_OPERANDS = ("x", "starts", "weights", "biases", "norms", "counter", "out", "qkv", "y", "h")
_SCRATCH = ("ring", "partial", "rows", "small")


def encoder_layers(x: jax.Array, query_starts: jax.Array, packed: PackedLayers, *, eps: float) -> jax.Array:
    """See `encoder_stack`."""
    layers, _, hidden = packed.norms.shape
    return _launch(x, query_starts, packed, shape=Shape(layers, hidden, packed.heads, eps))


@functools.partial(jax.jit, static_argnames="shape")
def _launch(x: jax.Array, query_starts: jax.Array, packed: PackedLayers, *, shape: Shape) -> jax.Array:
    out, *_ = launch(
        functools.partial(_kernel, shape=shape),
        (x, query_starts, packed.weights, packed.biases, packed.norms, packed.counter),
        out_type=tuple(jax.ShapeDtypeStruct((TOKENS, n * shape.hidden), x.dtype) for n in (1, 3, 1, 4)),
        scratch=dict(
            ring=plgpu.SMEM((shape.slots * shape.chunk // 2,), x.dtype),
            partial=plgpu.SMEM((shape.partial // 4,), jnp.float32),
            rows=plgpu.SMEM((TOKENS * shape.row // 2,), x.dtype),
            small=plgpu.SMEM((shape.small // 4,), jnp.int32),
        ),
        grid={"block": shape.blocks},
        warpgroups=shape.heads // 4,
        name="encoder_stack",
    )
    return out


def _kernel(*refs: Any, shape: Shape, **scratch: Any) -> None:
    names = (*_OPERANDS, *_SCRATCH)
    arrays = (*refs, *(scratch[name] for name in _SCRATCH))
    index = lax.axis_index("block")
    splat = plgpu.Layout.WG_SPLAT

    def run(part: Callable[[Block, Int32], None], layer: jax.Array) -> None:
        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(arrays), splat, splat))
        def inlined(ctx: Any, *operands: Any) -> None:
            *given, index, layer = operands
            lane, thread = this_thread(), Int32(mgpu_utils.thread_idx())
            block = Block(
                shape=shape,
                refs=dict(zip(names, given, strict=True)),
                index=Int32(index.registers.item()),
                thread=thread,
                warp=thread // 32,
                lane=thread % 32,
                group=lane.group,
                pair=lane.pair,
            )
            part(block, Int32(layer.registers.item()))

        inlined(*arrays, index, layer)

    run(_start, jnp.int32(0))
    lax.fori_loop(0, shape.layers, lambda layer, _: run(_layer, layer), None)
    run(_finish, jnp.int32(0))


def _start(block: Block, layer: Int32) -> None:
    """Begins the first copies, finds each token's text and their number, and brings x to shared memory."""
    shape = block.shape
    with mgpu_utils.when(block.thread.below(1)):
        init_copy_barriers(block["small"], shape.slots)
    block_barrier()
    for chunk in range(AHEAD):
        fetch(block, layer, chunk)
    with mgpu_utils.when(block.thread.below(TOKENS)):
        segment = int32(0)
        (texts,) = ir.MemRefType(block["starts"].type).shape
        for i in range(1, texts):
            start = Int32(llvm.load(words(1), pointer(block["starts"], int32(4 * i))))
            ended = arith.cmpi(arith.CmpIPredicate.sle, start.value, block.thread.value)
            segment = segment + Int32(arith.extui(words(1), ended))
        llvm.store(segment.value, pointer(block["small"], block.thread * 4 + shape.segments_at))
        # `start` is the last text's end: the tokens that are not padding.
        llvm.store(start.value, pointer(block["small"], int32(shape.tokens_at)))
    per_row = 2 * shape.hidden // 16
    for first in range(0, TOKENS * per_row, 32 * shape.heads):
        place = block.thread + first
        with mgpu_utils.when(place.below(TOKENS * per_row)):
            value = llvm.load(words(4), pointer(block["x"], place * 16))
            llvm.store(value, pointer(block["rows"], place // per_row * shape.row + place % per_row * 16))
    block_barrier()


def _layer(block: Block, layer: Int32) -> None:
    """One layer of x in shared memory.

    It begins with its chunks below AHEAD on their way and fetches 5 to 16, from 12 on the next layer's, each into a
    slot whose chunk, at least ten before, all warps have read by then.
    """
    hidden, first = block.shape.hidden, block.index * COLUMNS

    def store_qkv(row: Int32, column: Int32, low: Any, high: Any) -> None:
        store_pair(block["qkv"], 3 * hidden, row, column, low, high)

    def store_up(row: Int32, column: Int32, low: Any, high: Any) -> None:
        store_pair(block["h"], 4 * hidden, row, column, gelu(low), gelu(high))

    def store_sum(row: Int32, column: Int32, low: Any, high: Any) -> None:
        (word,) = load_words(block["rows"], row * block.shape.row + column * 2, 4)
        before = from_bfloat16_pair(word)
        store_pair(block["y"], hidden, row, column, arith.addf(low, before[0]), arith.addf(high, before[1]))

    bring_small(block, layer + 1)
    at_qkv, at_output, at_up, at_down = (
        Places(3, first, hidden, bias=0),
        Places(1, first, 0, bias=3 * hidden),
        Places(4, first * 4, COLUMNS, bias=4 * hidden),
        Places(1, first, 0, bias=8 * hidden),
    )
    qkv_bias, output_bias, up_bias, down_bias = (
        first_bias(block, layer, at) for at in (at_qkv, at_output, at_up, at_down)
    )

    x = columns_of_rows(block)
    fetch(block, layer, 5)
    sums = [multiply_chunk(block, layer, chunk, x, no_sums()) for chunk in range(3)]
    reduce(block, layer, at_qkv, sums, qkv_bias, store_qkv, following=6)
    meet(block, layer, 0, following=7)

    attended = attention(block)
    fetch(block, layer, 8)
    sums = [multiply_chunk(block, layer, 3, attended, no_sums())]
    reduce(block, layer, at_output, sums, output_bias, store_sum, following=9)
    weights = affine(block, layer, 0)
    meet(block, layer, 1, following=10)

    norm(block, weights)
    fetch(block, layer, 11)
    x = columns_of_rows(block)
    sums = [multiply_chunk(block, layer, chunk, x, no_sums()) for chunk in range(4, 8)]
    reduce(block, layer, at_up, sums, up_bias, store_up, following=12)
    meet(block, layer, 2, following=13)

    total = no_sums()
    for i, left in enumerate([columns_of_h(block, part) for part in range(4)]):
        total = multiply_chunk(block, layer, 8 + i, left, total)
        if i == 0:
            fetch(block, layer, 14)
    reduce(block, layer, at_down, [total], down_bias, store_sum, following=15)
    weights = affine(block, layer, 2)
    meet(block, layer, 3, following=16)
    norm(block, weights)


def _finish(block: Block, layer: Int32) -> None:
    """Each block writes its columns of the last layer's result."""
    shape = block.shape
    with mgpu_utils.when(block.thread.below(TOKENS)):
        column = block.index * (2 * COLUMNS)
        value = llvm.load(words(4), pointer(block["rows"], block.thread * shape.row + column))
        llvm.store(value, pointer(block["out"], block.thread * (2 * shape.hidden) + column))
    with mgpu_utils.when(block.thread.below(1)):
        leave_grid(block["counter"], shape.meetings + shape.blocks)
