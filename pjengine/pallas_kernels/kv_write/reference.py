"""jnp references of `kv_write`, also the CPU path: one scatter per page pool, in place under donation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pjengine.pallas_kernels.head_norms import norm_heads
from pjengine.pallas_kernels.rope import apply_rope
from pjengine.pallas_kernels.specs import KVWriteSpec


def rope_write_kv(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array | None,
    sin: jax.Array | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    write_slots: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    *,
    spec: KVWriteSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pjengine.pallas_kernels.rope_write_kv`."""
    if cos is not None and sin is not None:
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    return q, _write(k_pages, k, write_slots, k_scale), _write(v_pages, v, write_slots, v_scale)


def rope_write_kv_qkv(
    qkv: jax.Array,
    cos: jax.Array | None,
    sin: jax.Array | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    write_slots: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    q_norm: jax.Array | None,
    k_norm: jax.Array | None,
    *,
    spec: KVWriteSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pjengine.pallas_kernels.rope_write_kv_qkv`."""
    q, k, v = jnp.split(qkv, (spec.heads, spec.heads + spec.kv_heads), axis=1)
    q, k = norm_heads(q, k, q_norm, k_norm, spec.norm_eps)
    return rope_write_kv(q, k, v, cos, sin, k_pages, v_pages, write_slots, k_scale, v_scale, spec=spec)


def quantised(tokens: jax.Array, dtype: jnp.dtype, scale: jax.Array | None) -> jax.Array:
    """tokens [T, kv_heads, head_dim] as the cache stores them: divided by scale, clipped where float8, cast."""
    if scale is not None:
        tokens = tokens.astype(jnp.float32) / jnp.broadcast_to(scale, tokens.shape[1:2])[:, None]
    if dtype.itemsize == 1:
        limit = float(jnp.finfo(dtype).max)  # beyond it a cast to float8 gives NaN
        tokens = jnp.clip(tokens.astype(jnp.float32), -limit, limit)
    return tokens.astype(dtype)


def _write(pages: jax.Array, tokens: jax.Array, slots: jax.Array, scale: jax.Array | None) -> jax.Array:
    """pages with tokens [T, kv_heads, head_dim] at their slots; negative slots dropped."""
    page_size = pages.shape[2]
    # A negative index would wrap around; one past the end is dropped.
    page = jnp.where(slots < 0, pages.shape[0], slots // page_size)
    return pages.at[page, :, slots % page_size].set(quantised(tokens, pages.dtype, scale), mode="drop")
