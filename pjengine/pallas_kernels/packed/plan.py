"""How a packed batch is cut into tiles of queries, and which keys each of them reads: plain JAX on integers.

Equal for all layers of a step, so XLA computes it once.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pjengine.pallas_kernels.specs import AttentionSpec

GRANULE = 8  # rows: a TMA copy into tiled shared memory begins at a multiple of it


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ranges", "tiles"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PackedPlan:
    """Work of one packed attention call, on the device.

    Attributes:
      ranges: int32 [2, tokens + tile rows], first and end of the keys each token sees; 0 and 0 for padding.
      tiles: int32 [n, 8], or [n, 8 + 4 * parts] where tiles have several parts: first and end of a tile's tokens, first
        key to read (a multiple of GRANULE), blocks of keys to read (at least 1), and of those the first and end of the
        blocks that every token of the tile sees whole. A tile's tokens lie within `rows` of its first one's granule.
        Tiles of padding see nothing. Then, equal in all n rows, so that a kernel needs not one load after the other:
        from which token on all are padding, and how many of the n tiles there are; the others are meaningless but for
        these two. Then, for each part of a tile that has several: of its blocks the first and the end of those that any
        of the part's tokens sees, and of those that all of them see whole. A part without tokens has no blocks, one
        whose tokens see nothing has the first.
    """

    ranges: jax.Array
    tiles: jax.Array


def packed_plan(
    query_starts: jax.Array,
    tokens: int,
    spec: AttentionSpec,
    *,
    rows: int,
    block: int,
    parts: int = 1,
) -> PackedPlan:
    """Cuts the batch into tiles of at most `rows` queries that read blocks of `block` keys.

    A tile of one part ends with a sequence wherever one ends within its rows: short sequences then meet no keys but
    those of their own tile, and a tile's worth of keys is one block. Tiles of several parts are cut every `rows`
    tokens: each part skips the blocks that its tokens do not see.
    """
    total = query_starts[-1]
    token = jnp.arange(tokens + rows, dtype=jnp.int32)
    last_row = query_starts.shape[0] - 1
    row = jnp.searchsorted(query_starts[1:], token, side="right", method="scan_unrolled")
    real = token < total
    begin = jnp.where(real, query_starts[jnp.minimum(row, last_row)], 0)
    end = jnp.where(real, query_starts[jnp.minimum(row + 1, last_row)], 0)
    if spec.window is not None:
        begin = jnp.where(real, jnp.maximum(begin, token - spec.window + 1), 0)
        if not spec.causal:
            end = jnp.minimum(end, token + spec.window)
    if spec.causal:
        end = jnp.minimum(end, token + 1)

    if parts == 1:
        cuts = tile_cuts(query_starts, tokens, rows)
    else:
        cuts = jnp.minimum(jnp.arange(-(-tokens // rows) + 1, dtype=jnp.int32) * rows, tokens)
    first, last = cuts[:-1], cuts[1:]
    ranges = jnp.stack([begin, end]).astype(jnp.int32)
    begin, end = (jnp.where(real, x, total) for x in (begin, end))
    # Both ends of what a token sees grow from token to token: the first and the last of a tile tell for all.
    final = jnp.maximum(last - 1, 0)
    lowest = begin[first] // GRANULE * GRANULE
    seen = first < total
    blocks = jnp.where(seen, -(-(end[final] - lowest) // block), 1)
    lowest = jnp.where(seen, lowest, first // GRANULE * GRANULE)
    whole_begin = jnp.where(seen, jnp.clip(-(-(begin[final] - lowest) // block), 0, blocks), blocks)
    whole_end = jnp.clip((end[first] - lowest) // block, whole_begin, blocks)
    count = (first < tokens).sum(dtype=jnp.int32)
    for_all = (jnp.broadcast_to(x, first.shape) for x in (total, count))
    columns = [first, last, lowest, blocks, whole_begin, whole_end, *for_all]
    for part in range(parts if parts > 1 else 0):
        low, high = (jnp.minimum(first + i * rows // parts, last) for i in (part, part + 1))
        columns += _blocks_of_part(begin, end, low, high, lowest, blocks, block)
    tiles = jnp.stack(columns, axis=1)
    return PackedPlan(ranges, tiles.astype(jnp.int32))


def _blocks_of_part(
    begin: jax.Array,
    end: jax.Array,
    low: jax.Array,
    high: jax.Array,
    lowest: jax.Array,
    blocks: jax.Array,
    block: int,
) -> list[jax.Array]:
    """The columns of one part, the tokens [low, high) of each tile, whose blocks begin at the key `lowest`."""
    filled, final = low < high, jnp.maximum(high - 1, 0)
    used_begin = jnp.where(filled, (begin[low] - lowest) // block, blocks)
    used_end = jnp.where(filled, -(-(end[final] - lowest) // block), blocks)
    blind = filled & (end[low] == begin[low])
    used_begin, used_end = jnp.where(blind, 0, used_begin), jnp.where(blind, 1, used_end)
    whole_begin = jnp.clip(-(-(begin[final] - lowest) // block), used_begin, used_end)
    whole_begin = jnp.where(blind, used_end, whole_begin)
    whole_end = jnp.clip((end[low] - lowest) // block, whole_begin, used_end)
    return [used_begin, used_end, whole_begin, whole_end]


def tile_cuts(query_starts: jax.Array, tokens: int, rows: int) -> jax.Array:
    """Tokens at which tiles begin, and where the last one ends: int32 [n + 1], all `tokens` from there on.

    The tile that begins at p ends at the last border of sequences within its rows, or where there is none (a longer
    sequence, padding) with its rows. Tile i begins where i such steps lead from 0: of each power of two of steps there
    is one table, and i's bits say which of them to take.
    """
    place = jnp.arange(tokens + 1, dtype=jnp.int32)
    limit = place // GRANULE * GRANULE + rows
    border = query_starts[jnp.searchsorted(query_starts, limit, side="right", method="scan_unrolled") - 1]
    jump = jnp.minimum(jnp.where(border > place, border, limit), tokens)
    count = tile_bound(tokens, rows)
    index = jnp.arange(count + 1, dtype=jnp.int32)
    at = jnp.zeros_like(index)
    for bit in range(count.bit_length()):
        at = jnp.where((index >> bit) & 1 == 1, jump[at], at)
        if bit + 1 < count.bit_length():
            jump = jump[jump]
    return at


def tile_bound(tokens: int, rows: int) -> int:
    """Most tiles there can be: two that follow one another reach at least as far as the first one's rows."""
    return 2 * math.ceil(tokens / (rows - GRANULE + 1)) + 1
