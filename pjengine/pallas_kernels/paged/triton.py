"""`paged_attention` in Triton: rows of one query are cut along the cache, the others go tile by tile."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pjengine.pallas_kernels.backends import current_target
from pjengine.pallas_kernels.specs import AttentionSpec
from pjengine.pallas_kernels.triton_attention import (
    TileConfig,
    Work,
    attend,
    attend_single,
    queries_per_item,
    tile_config,
)
from pjengine.pallas_kernels.work_items import query_items


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    query_starts: jax.Array,
    kv_lens: jax.Array,
    block_tables: jax.Array,
    sinks: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    *,
    spec: AttentionSpec,
    scale: float,
    tiles: TileConfig | None = None,
    single_tiles: TileConfig | None = None,
) -> jax.Array:
    """See `pjengine.pallas_kernels.paged_attention`. tiles, single_tiles: instead of the tuned ones."""
    target = current_target()
    single_tiles = single_tiles or tile_config(spec, target, single=True)
    operands = (sinks, k_scale, v_scale)
    rows = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    none, one = jnp.zeros_like(rows), jnp.ones_like(rows)

    def single(starts: jax.Array, lens: jax.Array) -> jax.Array:
        work = Work(rows, none, starts, one, lens, block_tables)
        decode = dataclasses.replace(spec, decode=True)
        return attend_single(
            q, k_pages, v_pages, work, *operands, spec=decode, scale=scale, config=single_tiles, target=target
        )

    if spec.decode:
        return single(rows, kv_lens)
    config = tiles or tile_config(spec, target, single=False)
    starts, counts = query_starts[:-1], query_starts[1:] - query_starts[:-1]
    several = jnp.where((counts > 1) & (kv_lens > 0), counts, 0)
    item_rows, offsets = query_items(several, q.shape[0], queries_per_item(spec, config))
    work = Work(item_rows, offsets, starts, counts, kv_lens, block_tables)
    out = attend(q, k_pages, v_pages, work, *operands, spec=spec, scale=scale, config=config, target=target)
    tokens = jnp.where((counts == 1) & (kv_lens > 0), starts, q.shape[0])
    singles = single(jnp.minimum(starts, q.shape[0] - 1), jnp.where(counts == 1, kv_lens, 0))
    return out.at[tokens].set(singles, mode="drop")
