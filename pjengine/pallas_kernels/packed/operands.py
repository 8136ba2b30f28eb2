"""What the packed kernels read: q, k and v, apart or side by side in one array."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pjengine.pallas_kernels.packed.plan import GRANULE
from pjengine.pallas_kernels.specs import AttentionSpec


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["heads_at", "out_type"])
@dataclasses.dataclass(frozen=True)
class PackedOperands:
    """Attributes:
    arrays: q, k, v, or one array that holds all three; [tokens, heads, head_dim] each, tokens a multiple of GRANULE.
    heads_at: where the heads of q, k and v begin in their array.
    out_type: of the result.
    """

    arrays: tuple[jax.Array, ...]
    heads_at: tuple[int, int, int]
    out_type: jax.ShapeDtypeStruct

    @property
    def dtype(self) -> jnp.dtype:
        return self.arrays[0].dtype


def taken_apart(arrays: tuple[jax.Array, ...], spec: AttentionSpec) -> tuple[jax.Array, ...]:
    """q, k and v, of (q, k, v) or (qkv,)."""
    return arrays if len(arrays) == 3 else tuple(jnp.split(arrays[0], (spec.heads, spec.heads + spec.kv_heads), axis=1))


def packed_operands(arrays: tuple[jax.Array, ...], spec: AttentionSpec) -> PackedOperands:
    """arrays: (q, k, v), or (qkv,) with the heads of q, then k's, then v's."""
    tokens = arrays[0].shape[0]
    padding = ((0, -tokens % GRANULE), (0, 0), (0, 0))
    heads_at = (0, 0, 0) if len(arrays) == 3 else (0, spec.heads, spec.heads + spec.kv_heads)
    out_type = jax.ShapeDtypeStruct((tokens, spec.heads, spec.head_dim), arrays[0].dtype)
    return PackedOperands(tuple(jnp.pad(x, padding) for x in arrays), heads_at, out_type)
