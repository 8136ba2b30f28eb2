"""Which keys a query sees: the one statement of causality, windows and chunks that all references share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Below every real score, yet finite: the difference of two masked scores must not be NaN.
MASKED = -1e30


def visible(
    query_positions: jax.Array, key_positions: jax.Array, *, causal: bool, window: int | None, chunk: int | None
) -> jax.Array:
    """Bool mask, of the broadcast shape of the two int32 position arrays (positions inside one sequence).

    Args:
      causal: keys after the query are hidden.
      window: keys at or before `query - window` are hidden; where not causal also those at or after `query + window`.
      chunk: keys outside the query's own chunk [c * chunk, (c + 1) * chunk) are hidden (Llama 4's local attention).
    """
    mask = jnp.ones(jnp.broadcast_shapes(query_positions.shape, key_positions.shape), bool)
    if causal:
        mask &= key_positions <= query_positions
    if window is not None:
        mask &= key_positions > query_positions - window
        if not causal:
            mask &= key_positions < query_positions + window
    if chunk is not None:
        mask &= key_positions // chunk == query_positions // chunk
    return mask


def first_visible(query_positions: jax.Array, *, window: int | None, chunk: int | None) -> jax.Array:
    """Lowest key position a causal query sees: int32, of the queries' shape."""
    first = jnp.zeros_like(query_positions)
    if window is not None:
        first = jnp.maximum(first, query_positions - window + 1)
    if chunk is not None:
        first = jnp.maximum(first, query_positions // chunk * chunk)
    return first


def cap_scores(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    """soft_cap * tanh(scores / soft_cap), or the scores unchanged where it is None."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
