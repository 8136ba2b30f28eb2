"""Lists of work items over ragged rows, made on the device with static shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def query_items(counts: jax.Array, tokens: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Cuts each row's queries into items of `size`, the last of a row shorter.

    Args:
      counts: int32 [R], queries of each row, of sum `tokens` at most.
    Returns: int32 [tokens // size + R] each: the row of an item, -1 past the last one, and its first query in that row.
    """
    ends = jnp.cumsum(-(-counts // size))
    item = jnp.arange(tokens // size + counts.shape[0], dtype=jnp.int32)
    row = jnp.searchsorted(ends, item, side="right", method="compare_all").astype(jnp.int32)
    before = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])[row]
    return jnp.where(item < ends[-1], row, -1), ((item - before) * size).astype(jnp.int32)
