"""The second half of split-KV decode: pieces of one query's attention become its result."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.mosaic_common import MASKED, load_whole, store_prefix
from pjengine.pallas_kernels.paged import decode_tiles as tiles
from pjengine.pallas_kernels.specs import AttentionSpec


def partial_size(group: int, head_dim: int) -> int:
    """Elements of a piece: the group's results, padded to whole elements per thread."""
    return -(-group * head_dim // 128) * 128


def combine_pieces(
    partial_ref: Any,
    lse_ref: Any,
    out_ref: Any,
    first: jax.Array,
    last: jax.Array,
    *,
    spec: AttentionSpec,
    unroll: int,
) -> None:
    """Weighs the pieces of one (row, KV head) pair that the workers first..last left by their log2-sum-exp.

    Args:
      partial_ref: float32 [workers * 2, partial_size]; lse_ref: float32 [workers * 2, columns]. Worker w leaves the
        piece that opens a pair at 2 * w + 1, one that continues a pair at 2 * w.
      out_ref: [group * head_dim] in global memory.
      unroll: pieces whose loads are in flight together.
    """
    size = partial_ref.shape[1]
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=math.gcd(4, size // 128))

    def add(chunk: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, acc = state
        workers = [first + chunk * unroll + i for i in range(unroll)]
        places = [jnp.minimum(w, last) * 2 + (w == first).astype(jnp.int32) for w in workers]
        # All loads come first: they are what takes time here.
        lses = [tiles.load_spread(lse_ref.at[place], size, layout, spec.group, spec.head_dim) for place in places]
        pieces = [load_whole(partial_ref.at[place], layout) for place in places]
        lses = [lse + jnp.where(w <= last, 0.0, MASKED) for w, lse in zip(workers, lses, strict=True)]
        new_top = functools.reduce(jnp.maximum, lses, top)
        rescale = jnp.exp2(top - new_top)
        total, acc = total * rescale, acc * rescale
        for piece, lse in zip(pieces, lses, strict=True):
            weight = jnp.exp2(lse - new_top)
            total, acc = total + weight, acc + piece * weight
        return new_top, total, acc

    state = tuple(plgpu.layout_cast(jnp.full((size,), x, jnp.float32), layout) for x in (MASKED, 0, 0))
    chunks = lax.div(last - first + unroll, jnp.int32(unroll))
    _, total, acc = lax.fori_loop(0, chunks, add, state)
    store_prefix(out_ref, (acc / total).astype(out_ref.dtype), layout, spec.group * spec.head_dim)
