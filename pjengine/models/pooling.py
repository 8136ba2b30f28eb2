"""One vector per sequence from the hidden states of packed tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pjengine.step_inputs import StepInputs

POOLINGS = ("mean", "cls", "last", "max", "weightedmean", "mean_sqrt_len")


def pool(hidden: jax.Array, inputs: StepInputs, mode: str) -> jax.Array:
    """One vector for each of a step's rows, float32 [R, hidden_size]; rows without tokens: unspecified but finite.

    Args:
      hidden: [T, hidden_size], of whole sequences packed one after the other.
      mode: one of POOLINGS: mean of all tokens, the first token, the last, each element's maximum, the mean weighted by
        position (the first token once, the second twice, …), the sum over the square root of the length.
    Raises: ValueError for another mode.
    """
    starts = inputs.query_starts
    lengths = jnp.maximum(jnp.diff(starts), 1).astype(jnp.float32)[:, None]
    match mode:
        case "mean":
            return _sums(hidden.astype(jnp.float32), starts) / lengths
        case "mean_sqrt_len":
            return _sums(hidden.astype(jnp.float32), starts) / jnp.sqrt(lengths)
        case "weightedmean":
            weights = (inputs.positions + 1).astype(jnp.float32)[:, None]
            return _sums(hidden.astype(jnp.float32) * weights, starts) / (lengths * (lengths + 1) / 2)
        case "max":
            rows = starts.shape[0] - 1
            found = jax.ops.segment_max(
                hidden.astype(jnp.float32), _rows(starts, hidden), rows, indices_are_sorted=True
            )
            return jnp.where(jnp.diff(starts)[:, None] > 0, found, 0)
        case "cls":
            return hidden[starts[:-1]].astype(jnp.float32)
        case "last":
            return hidden[inputs.last_tokens].astype(jnp.float32)
        case _:
            raise ValueError(f"mode: expected one of {', '.join(POOLINGS)}, got {mode!r}")


def unit_length(vectors: jax.Array) -> jax.Array:
    """Each of float32 [R, size] divided by its Euclidean length."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _rows(query_starts: jax.Array, hidden: jax.Array) -> jax.Array:
    """Row of each token, int32 [T]; tokens past the last row get R, which the segment operations drop."""
    return jnp.searchsorted(query_starts[1:], jnp.arange(hidden.shape[0]), side="right", method="compare_all")


def _sums(values: jax.Array, query_starts: jax.Array) -> jax.Array:
    rows = query_starts.shape[0] - 1
    return jax.ops.segment_sum(values, _rows(query_starts, values), rows, indices_are_sorted=True)
