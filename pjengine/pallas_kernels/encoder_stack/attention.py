"""Attention of a head by one warp, over at most 16 tokens: the queries are one tile, the keys two."""

from __future__ import annotations

import functools
import itertools
from typing import Any

from jaxlib.mlir.dialects import arith, llvm

from pjengine.pallas_kernels.encoder_stack.block import Block, Left, left_operands, load_row
from pjengine.pallas_kernels.mosaic_common import LOG2E, MASKED
from pjengine.pallas_kernels.registers import Int32, approximate, float32, interleave_halves, over_lanes, pointer, words
from pjengine.pallas_kernels.warp_code import multiply, no_sums, to_bfloat16_pair


def attention(block: Block) -> Left:
    """Of the warp's head: left operands of the output product, in the order of `packing.attended_rows`."""
    head_dim = block.shape.head_dim
    rows = (block.group, block.group + 8)
    seen = [block.pair * 2 + i for i in (0, 1, 8, 9)]
    # Queries and keys are cut alike: a lane has a quarter of the head's dimensions, in whatever order.
    upper, lower = (_load(block, 0, row, head_dim // 2, block.pair) for row in rows)
    keys = [_load(block, 1, row, head_dim // 2, block.pair) for row in rows]
    values = [_load(block, 2, row, head_dim // 4, block.group) for row in seen]
    scores = [no_sums(), no_sums()]
    for step, left in enumerate(left_operands(upper, lower)):
        for half in range(2):
            scores[half] = multiply(scores[half], left, keys[half][2 * step : 2 * step + 2])

    segments = [_segment(block, row) for row in seen]
    factor, masked = float32(LOG2E * head_dim**-0.5), float32(MASKED)
    weights, inverses = [], []
    for r, row in enumerate(rows):
        own = _segment(block, row)
        masked_scores = [
            arith.select(own.equals(other), arith.mulf(scores[i // 2][2 * r + i % 2], factor), masked)
            for i, other in enumerate(segments)
        ]
        top = over_lanes(functools.reduce(arith.maximumf, masked_scores), arith.maximumf, 4)
        mine = [approximate("ex2", arith.subf(score, top)) for score in masked_scores]
        inverses.append(approximate("rcp", over_lanes(functools.reduce(arith.addf, mine), arith.addf, 4)))
        weights.append([to_bfloat16_pair(mine[i], mine[i + 1]) for i in (0, 2)])
    left = [weights[0][0], weights[1][0], weights[0][1], weights[1][1]]

    # Words of two keys of one dimension: a lane has as many dimensions of v as there are tiles of 8.
    near, far = (
        itertools.chain.from_iterable(interleave_halves(a, b) for a, b in zip(*two, strict=True))
        for two in (values[:2], values[2:])
    )
    attended = []
    for right in zip(near, far, strict=True):
        tile = multiply(no_sums(), left, list(right))
        scaled = [arith.mulf(value, inverses[i // 2]) for i, value in enumerate(tile)]
        attended.append([to_bfloat16_pair(*scaled[:2]), to_bfloat16_pair(*scaled[2:])])
    return [attended[i] + attended[i + 1] for i in range(0, len(attended), 2)]


def _load(block: Block, part: int, row: Int32, nbytes: int, lane: Int32) -> list[Any]:
    """The lane'th nbytes of the warp's head in a row of q (part 0), k (1) or v (2), as words."""
    hidden, head_dim = block.shape.hidden, block.shape.head_dim
    first = row * (6 * hidden) + 2 * part * hidden + block.warp * (2 * head_dim) + lane * nbytes
    size = min(nbytes, 16)
    return [word for i in range(0, nbytes, size) for word in load_row(block, "qkv", row, first + i, size)]


def _segment(block: Block, token: Int32) -> Int32:
    """Which text a token is of."""
    return Int32(llvm.load(words(1), pointer(block["small"], token * 4 + block.shape.segments_at)))
