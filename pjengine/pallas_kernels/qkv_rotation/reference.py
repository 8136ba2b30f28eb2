"""jnp reference of `rope_qkv`, also the CPU path."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pjengine.pallas_kernels.head_norms import norm_heads
from pjengine.pallas_kernels.rope import apply_rope
from pjengine.pallas_kernels.specs import RotationSpec


def rope_qkv(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    q_norm: jax.Array | None,
    k_norm: jax.Array | None,
    *,
    spec: RotationSpec,
) -> jax.Array:
    """See `pjengine.pallas_kernels.rope_qkv`."""
    q, k, v = jnp.split(qkv, (spec.heads, spec.heads + spec.kv_heads), axis=1)
    q, k = norm_heads(q, k, q_norm, k_norm, spec.norm_eps)
    return jnp.concatenate([apply_rope(q, cos, sin), apply_rope(k, cos, sin), v], axis=1)
