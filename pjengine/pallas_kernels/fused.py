"""Fused projections: the heads of q, then those of k, then those of v, [T, heads + 2 * kv_heads, head_dim]."""

from __future__ import annotations

import jax


def query_heads(qkv: jax.Array, kv_heads: int) -> int:
    """How many of a fused projection's heads are queries. Raises: ValueError, its shape has no room for them."""
    heads = qkv.shape[1] - 2 * kv_heads if qkv.ndim == 3 else 0
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"qkv: expected [T, heads + 2 * {kv_heads}, head_dim], got {qkv.shape}")
    return heads
