"""Which heads the kernels hold in pieces (head_pieces.py); cheap to import, unlike those."""

from __future__ import annotations

import jax.numpy as jnp

VECTOR = 8  # elements of a load: 16 bytes
PIECE = 2 * VECTOR  # elements of a head that a thread holds
LANES = 32  # of a warp


def refusal(head_dim: int, dtype: str, *, norm: bool) -> str | None:
    """Why heads of that size and dtype cannot be held in pieces, and normalised, or None."""
    if jnp.dtype(dtype).itemsize != 2:
        return f"elements must be of 16 bits, got {dtype}"
    if head_dim % PIECE:
        return f"head_dim must be a multiple of {PIECE}, got {head_dim}"
    pieces = head_dim // PIECE
    if norm and (pieces & (pieces - 1) or pieces > LANES):
        return f"heads are normalised where head_dim is {PIECE} times a power of two up to {LANES}, got {head_dim}"
    return None
