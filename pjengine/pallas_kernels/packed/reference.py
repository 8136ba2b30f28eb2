"""jnp reference of `packed_attention`: static loops, so that `jax.grad` goes through it; also the CPU path."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.masking import MASKED, cap_scores, visible
from pjengine.pallas_kernels.packed.operands import taken_apart
from pjengine.pallas_kernels.specs import AttentionSpec

QUERY_BLOCK = 128

# A dot of float32 operands must not fall to TF32 on a GPU.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def packed_attention(
    arrays: tuple[jax.Array, ...],
    query_starts: jax.Array,
    sinks: jax.Array | None,
    *,
    spec: AttentionSpec,
    scale: float,
    relative_bias: jax.Array | None = None,
) -> jax.Array:
    """See `pjengine.pallas_kernels.packed_attention`. arrays: (q, k, v) or (qkv,).

    Each block of queries meets all T keys, others' rows masked.
    """
    q, k, v = taken_apart(arrays, spec)
    tokens, heads, head_dim = q.shape
    size = min(QUERY_BLOCK, tokens)
    blocks = -(-tokens // size)
    rows = query_starts.shape[0] - 1
    token = jnp.arange(tokens)
    row = jnp.searchsorted(query_starts[1:], token, side="right").astype(jnp.int32)
    real = (row < rows)[:, None, None]
    keys = jnp.where(real, k, 0).astype(jnp.float32)
    values = jnp.where(real, v, 0).astype(jnp.float32)

    @jax.checkpoint  # the backward pass recomputes the [heads, size, T] scores instead of keeping all of them
    def attend(block: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        queries, query_tokens, query_rows = block
        mask = (query_rows[:, None] == row) & (row < rows)
        mask &= visible(query_tokens[:, None], token, causal=spec.causal, window=spec.window, chunk=spec.chunk)
        grouped = (queries.astype(jnp.float32) * scale).reshape(size, spec.kv_heads, spec.group, head_dim)
        scores = cap_scores(_einsum("qkgd,skd->kgqs", grouped, keys), spec.soft_cap)
        if relative_bias is not None:
            reach = relative_bias.shape[1] // 2
            # Inside a sequence, tokens lie as far apart as their positions.
            places = jnp.clip(token - query_tokens[:, None], -reach, reach) + reach
            scores += jnp.asarray(relative_bias, jnp.float32)[:, places].reshape(scores.shape)
        scores = jnp.where(mask, scores, MASKED)
        top = scores.max(-1)
        if sinks is not None:
            logits = sinks.astype(jnp.float32).reshape(spec.kv_heads, spec.group, 1)
            top = jnp.maximum(top, logits)
        top = lax.stop_gradient(top)
        weights = jnp.where(mask, jnp.exp(scores - top[..., None]), 0)
        total = weights.sum(-1) if sinks is None else weights.sum(-1) + jnp.exp(logits - top)
        weights = weights / jnp.where(total == 0, 1, total)[..., None]
        return _einsum("kgqs,skd->qkgd", weights, values).reshape(size, heads, head_dim).astype(q.dtype)

    def blocked(x: jax.Array, fill: int) -> jax.Array:
        padding = [(0, blocks * size - tokens)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding, constant_values=fill).reshape(blocks, size, *x.shape[1:])

    out = lax.map(attend, (blocked(q, 0), blocked(token, tokens), blocked(row, rows)))
    return out.reshape(blocks * size, heads, head_dim)[:tokens]
