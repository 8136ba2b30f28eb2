"""RMS norms of the heads of q and k, before they are rotated."""

from __future__ import annotations

import jax

from pjengine.pallas_kernels.row_norm.reference import rms_norm


def head_norm_eps(
    q_norm: jax.Array | None, k_norm: jax.Array | None, eps: float, heads: jax.Array | jax.ShapeDtypeStruct
) -> float | None:
    """eps where q and k are to be normalised, else None.

    Args:
      heads: [T, …, head_dim], what the weights must fit.
    Raises:
      ValueError: one weight without the other, or weights that do not fit.
    """
    if q_norm is None and k_norm is None:
        return None
    if q_norm is None or k_norm is None:
        raise ValueError("q_norm, k_norm: expected both or neither")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight.shape != heads.shape[-1:] or weight.dtype != heads.dtype:
            expected = f"{heads.dtype} [{heads.shape[-1]}]"
            raise ValueError(f"{name}: expected {expected}, got {weight.dtype} {list(weight.shape)}")
    return eps


def norm_heads(
    q: jax.Array, k: jax.Array, q_norm: jax.Array | None, k_norm: jax.Array | None, eps: float | None
) -> tuple[jax.Array, jax.Array]:
    """q and k [T, heads, head_dim], each head normalised unless eps is None."""
    if eps is None or q_norm is None or k_norm is None:
        return q, k
    return rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
