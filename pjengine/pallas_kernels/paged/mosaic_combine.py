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
from pjengine.pallas_kernels.specs import AttentionSpec

UNROLL = 8  # pieces whose loads are in flight together


def partial_size(group: int, head_dim: int) -> int:
    """Elements of a piece: the group's results, padded to whole elements per thread."""
    return -(-group * head_dim // 128) * 128


def combine_pieces(
    partial_ref: Any, lse_ref: Any, out_ref: Any, first: jax.Array, last: jax.Array, *, spec: AttentionSpec
) -> None:
    """Weighs the pieces of one (row, KV head) pair that the workers first..last left by their log2-sum-exp.

    Args:
      partial_ref: float32 [workers * 2, partial_size]; lse_ref: float32 [workers * 2, columns]. Worker w leaves the
        piece that opens a pair at 2 * w + 1, one that continues a pair at 2 * w.
      out_ref: [group * head_dim] in global memory.
    """
    size = partial_ref.shape[1]
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=math.gcd(4, size // 128))
    member = lax.div(plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout), jnp.int32(spec.head_dim))

    def spread(per_member: list[jax.Array]) -> jax.Array:
        """float32 [size] of one scalar per query head of the group."""
        values = plgpu.layout_cast(jnp.full((size,), per_member[0], jnp.float32), layout)
        for index, value in enumerate(per_member[1:], start=1):
            values = jnp.where(member == index, value, values)
        return values

    def add(chunk: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        tops, totals, acc = state
        workers = [first + chunk * UNROLL + i for i in range(UNROLL)]
        places = [jnp.minimum(w, last) * 2 + (w == first).astype(jnp.int32) for w in workers]
        # All loads come first: they are what takes time here.
        pieces = [load_whole(partial_ref.at[place], layout) for place in places]
        lses = [[lse_ref[place, g] for g in range(spec.group)] for place in places]
        lses = [[jnp.where(w <= last, x, MASKED) for x in lse] for w, lse in zip(workers, lses, strict=True)]
        new_tops = [functools.reduce(jnp.maximum, column) for column in zip(tops, *lses, strict=True)]
        rescale = [jnp.exp2(old - new) for old, new in zip(tops, new_tops, strict=True)]
        totals = [total * r for total, r in zip(totals, rescale, strict=True)]
        acc = acc * spread(rescale)
        for w, piece, lse in zip(workers, pieces, lses, strict=True):
            weights = [jnp.where(w <= last, jnp.exp2(x - new), 0.0) for x, new in zip(lse, new_tops, strict=True)]
            totals = [total + weight for total, weight in zip(totals, weights, strict=True)]
            acc = acc + piece * spread(weights)
        return new_tops, totals, acc

    zeros = plgpu.layout_cast(jnp.zeros((size,), jnp.float32), layout)
    state = ([jnp.float32(MASKED)] * spec.group, [jnp.float32(0)] * spec.group, zeros)
    chunks = lax.div(last - first + UNROLL, jnp.int32(UNROLL))
    _, totals, acc = lax.fori_loop(0, chunks, add, state)
    acc = acc * spread([1 / total for total in totals])
    store_prefix(out_ref, acc.astype(out_ref.dtype), layout, spec.group * spec.head_dim)
