"""`packed_attention` in Triton."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pjengine.pallas_kernels.backends import current_target
from pjengine.pallas_kernels.packed.operands import taken_apart
from pjengine.pallas_kernels.specs import AttentionSpec
from pjengine.pallas_kernels.triton_attention import TileConfig, Work, attend, queries_per_item, tile_config
from pjengine.pallas_kernels.work_items import query_items


def packed_attention(
    arrays: tuple[jax.Array, ...],
    query_starts: jax.Array,
    sinks: jax.Array | None,
    *,
    spec: AttentionSpec,
    scale: float,
    relative_bias: jax.Array | None = None,
    tiles: TileConfig | None = None,
) -> jax.Array:
    """See `pjengine.pallas_kernels.packed_attention`. arrays: (q, k, v) or (qkv,); tiles: instead of the tuned ones."""
    q, k, v = taken_apart(arrays, spec)
    target = current_target()
    config = tiles or tile_config(spec, target, single=False)
    counts = query_starts[1:] - query_starts[:-1]
    item_rows, offsets = query_items(counts, q.shape[0], queries_per_item(spec, config))
    work = Work(item_rows, offsets, query_starts[:-1], counts, counts, jnp.zeros((1, 1), jnp.int32))
    return attend(q, k, v, work, sinks, None, None, relative_bias, spec=spec, scale=scale, config=config, target=target)
