"""Log-probabilities of tokens, on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from pjengine.sampling_params import MAX_LOGPROBS
from pjengine.token_draw import Rows, first


@struct.dataclass
class Logprobs:
    """Of the model's own distribution, before any adjustment."""

    token: jax.Array  # float32 [N]
    rank: jax.Array  # int32 [N], 1 is the most likely
    top_ids: jax.Array  # int32 [N, MAX_LOGPROBS]
    top: jax.Array  # float32 [N, MAX_LOGPROBS]


def compute_logprobs(logits: jax.Array, tokens: jax.Array) -> Logprobs:
    """Log-probabilities of `tokens` int32 [N] and of the MAX_LOGPROBS likeliest under float32 logits [N, vocab]."""
    rows = Rows.of(logits)
    top_ids, top = first(jnp.max(rows.blocks, axis=2), rows, min(MAX_LOGPROBS, logits.shape[1]))
    chosen = rows.at(tokens[:, None])
    norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    rank = 1 + jnp.sum(logits > chosen, axis=-1, dtype=jnp.int32)
    return Logprobs((chosen - norm)[:, 0], rank, top_ids, top - norm)
