"""One vector per sequence from the hidden states of packed tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pjengine.step_inputs import StepInputs

POOLINGS = ("mean", "cls", "last")


def pool(hidden: jax.Array, inputs: StepInputs, mode: str, normalize: bool) -> jax.Array:
    """Embeddings of a step's rows, float32 [R, hidden_size]; rows without tokens are unspecified but finite.

    Args:
      hidden: [T, hidden_size], of whole sequences packed one after the other.
      mode: one of POOLINGS: mean of all tokens, the first token, the last.
      normalize: divide each embedding by its Euclidean length.
    Raises: ValueError for another mode.
    """
    match mode:
        case "mean":
            pooled = _mean(hidden, inputs.query_starts)
        case "cls":
            pooled = hidden[inputs.query_starts[:-1]].astype(jnp.float32)
        case "last":
            pooled = hidden[inputs.last_tokens].astype(jnp.float32)
        case _:
            raise ValueError(f"mode: expected one of {', '.join(POOLINGS)}, got {mode!r}")
    if not normalize:
        return pooled
    return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)


def _mean(hidden: jax.Array, query_starts: jax.Array) -> jax.Array:
    rows = query_starts.shape[0] - 1
    # Tokens past the last row fall into segment `rows`, which segment_sum drops.
    segments = jnp.searchsorted(query_starts[1:], jnp.arange(hidden.shape[0]), side="right", method="compare_all")
    sums = jax.ops.segment_sum(hidden.astype(jnp.float32), segments, rows, indices_are_sorted=True)
    return sums / jnp.maximum(jnp.diff(query_starts), 1)[:, None]
