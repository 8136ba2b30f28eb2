"""Rotary position embedding, rotate-half layout (Su et al. 2021, arXiv:2104.09864; the layout is Hugging Face's)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def check_angles(cos: jax.Array, sin: jax.Array, tokens: int, head_dim: int) -> None:
    """Raises: ValueError, they are not [tokens, head_dim // 2] both."""
    if cos.shape != (tokens, head_dim // 2) or sin.shape != cos.shape:
        raise ValueError(f"cos, sin: expected [{tokens}, {head_dim // 2}], got {cos.shape} and {sin.shape}")


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates each head: element i pairs with element i + head_dim // 2. Computed in float32.

    Args:
      x: [T, heads, head_dim], head_dim even.
      cos, sin: float32 [T, head_dim // 2], of each token's angles.
    Returns: [T, heads, head_dim] in x's dtype.
    Raises: ValueError, shapes that contradict each other.
    """
    half = x.shape[-1] // 2
    if x.shape[-1] != 2 * half:
        raise ValueError(f"x: expected an even head_dim, got {x.shape}")
    check_angles(cos, sin, x.shape[0], x.shape[-1])
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
