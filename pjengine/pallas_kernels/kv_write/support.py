"""Which KV writes each GPU backend serves; cheap to import, unlike the backends themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pjengine.pallas_kernels.backends import Target
from pjengine.pallas_kernels.specs import KVWriteSpec


def mosaic_refusal(spec: KVWriteSpec, target: Target) -> str | None:
    """Why the Mosaic backend cannot serve such a call, or None."""
    if target.compute_capability != 90:
        return f"needs compute capability 9.0, got {target.compute_capability}"
    if spec.head_dim * jnp.dtype(spec.kv_dtype).itemsize % 16:
        return f"a head of {spec.head_dim} {spec.kv_dtype} is no multiple of the 16 bytes that TMA moves"
    if spec.kv_heads * spec.head_dim * jnp.dtype(spec.kv_dtype).itemsize % 128:
        return f"{spec.kv_heads} heads of {spec.head_dim} {spec.kv_dtype} are no multiple of 128 bytes"
    if spec.head_dim > 256 or spec.kv_heads > 256:
        return f"TMA boxes hold at most 256 elements a side, got {spec.kv_heads} heads of {spec.head_dim}"
    return None


def check_pages(
    k_pages: jax.Array, v_pages: jax.Array, write_slots: jax.Array, *, tokens: int, kv_heads: int, head_dim: int
) -> None:
    """Raises: ValueError, pages [pages, kv_heads, page_size, head_dim] or slots [tokens] that do not fit what is to be
    written.
    """
    if k_pages.shape != v_pages.shape or k_pages.shape[1::2] != (kv_heads, head_dim):
        raise ValueError(
            f"k_pages, v_pages: {k_pages.shape}, {v_pages.shape} do not fit {kv_heads} KV heads of {head_dim}"
        )
    if write_slots.shape != (tokens,):
        raise ValueError(f"write_slots: expected [{tokens}], got {write_slots.shape}")
