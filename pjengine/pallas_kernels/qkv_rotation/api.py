"""`rope_qkv`: the public op, its argument checks and its backends."""

from __future__ import annotations

import jax

from pjengine.pallas_kernels.backends import Backend, accept, select
from pjengine.pallas_kernels.fused import query_heads
from pjengine.pallas_kernels.head_norms import head_norm_eps
from pjengine.pallas_kernels.qkv_rotation.support import mosaic_refusal
from pjengine.pallas_kernels.rope import check_angles
from pjengine.pallas_kernels.specs import RotationSpec

BACKENDS = (
    Backend("mosaic", mosaic_refusal, "pjengine.pallas_kernels.qkv_rotation.mosaic", "rope_qkv"),
    Backend("reference", accept, "pjengine.pallas_kernels.qkv_rotation.reference", "rope_qkv"),
)


def rotator(attention_backend: str) -> str:
    """The backend to ask for beside that attention backend."""
    # Triton's kernel takes q, k and v apart: XLA rotates them on the way.
    return "reference" if attention_backend == "triton" else attention_backend


def rope_qkv(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    kv_heads: int,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> jax.Array:
    """Rotates the queries and keys of a fused projection, in place where nothing else reads it.

    Args:
      qkv: [T, heads + 2 * kv_heads, head_dim]: the heads of q, then those of k, then those of v.
      cos, sin: float32 [T, head_dim // 2] as in `apply_rope`.
      q_norm, k_norm, eps: as in `rope_write_kv_qkv`.
      backend: as in `paged_attention`; "triton", which takes q, k and v apart, asks for "reference".
    Returns: as qkv, for `packed_attention_qkv`.
    Raises:
      ValueError: shapes that contradict each other.
      ConfigError, KernelUnavailable: see backends.select.
    """
    heads = query_heads(qkv, kv_heads)
    tokens, _, head_dim = qkv.shape
    check_angles(cos, sin, tokens, head_dim)
    spec = RotationSpec(heads, kv_heads, head_dim, qkv.dtype.name, head_norm_eps(q_norm, k_norm, eps, qkv))
    implementation = select("rope_qkv", rotator(backend), BACKENDS, spec).load()
    return implementation(qkv, cos, sin, q_norm, k_norm, spec=spec)
