"""`rope_write_kv` and `rope_write_kv_qkv`: the public ops, their argument checks and their backends."""

from __future__ import annotations

import dataclasses

import jax

from pjengine.pallas_kernels.backends import Backend, accept, select
from pjengine.pallas_kernels.fused import query_heads
from pjengine.pallas_kernels.head_norms import head_norm_eps
from pjengine.pallas_kernels.kv_write.support import check_pages, mosaic_refusal
from pjengine.pallas_kernels.rope import check_angles
from pjengine.pallas_kernels.specs import KVWriteSpec

BACKENDS = (
    Backend("mosaic", mosaic_refusal, "pjengine.pallas_kernels.kv_write.mosaic", "rope_write_kv"),
    Backend("reference", accept, "pjengine.pallas_kernels.kv_write.reference", "rope_write_kv"),
)
BACKENDS_QKV = (
    Backend("mosaic", mosaic_refusal, "pjengine.pallas_kernels.kv_write.mosaic_qkv", "rope_write_kv_qkv"),
    Backend("reference", accept, "pjengine.pallas_kernels.kv_write.reference", "rope_write_kv_qkv"),
)


def writer(attention_backend: str) -> str:
    """The backend to ask for beside that attention backend."""
    return "auto" if attention_backend == "triton" else attention_backend


def rope_write_kv(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array | None,
    sin: jax.Array | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    write_slots: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotates q and k and writes k and v into their pages; in place where k_pages and v_pages are donated.

    Args:
      q: [T, heads, head_dim]; k, v: [T, kv_heads, head_dim], in one dtype.
      cos, sin: float32 [T, head_dim // 2] as in `apply_rope`, or both None: no rotation.
      k_pages, v_pages: [pages, kv_heads, page_size, head_dim], of any float dtype or float8_e4m3fn.
      write_slots: int32 [T]: page * page_size + offset; no two equal; a negative one is not written.
      k_scale, v_scale: float32 scalar or [kv_heads]: what is stored is k / k_scale and v / v_scale, clipped to the
        cache dtype's range, as `paged_attention` multiplies them back.
      backend: as in `paged_attention`; "triton", which has no writer, leaves the choice to "auto".
    Returns: (q rotated [T, heads, head_dim], k_pages, v_pages).
    Raises:
      ValueError: shapes that contradict each other.
      ConfigError, KernelUnavailable: see backends.select.
    """
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"k, v: shapes {k.shape}, {v.shape} do not fit q {q.shape}")
    spec = _spec((q.shape[1], k.shape[1]), q, cos, sin, k_pages, v_pages, write_slots, (k_scale, v_scale))
    implementation = select("rope_write_kv", writer(backend), BACKENDS, spec).load()
    return implementation(q, k, v, cos, sin, k_pages, v_pages, write_slots, k_scale, v_scale, spec=spec)


def rope_write_kv_qkv(
    qkv: jax.Array,
    cos: jax.Array | None,
    sin: jax.Array | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    write_slots: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`rope_write_kv` of a fused projection, read where it lies, whose queries and keys may be normalised first.

    Args:
      qkv: [T, heads + 2 * kv_heads, head_dim]: the heads of q, then those of k, then those of v.
      q_norm, k_norm: [head_dim] in qkv's dtype, weights of an RMS norm of each head of q and of k before rotation, or
        both None; eps: of those norms.
      The others: as in `rope_write_kv`.
    Returns: (q rotated [T, heads, head_dim], k_pages, v_pages).
    Raises: as `rope_write_kv`.
    """
    kv_heads = k_pages.shape[1]
    heads = query_heads(qkv, kv_heads)
    spec = _spec((heads, kv_heads), qkv, cos, sin, k_pages, v_pages, write_slots, (k_scale, v_scale))
    spec = dataclasses.replace(spec, norm_eps=head_norm_eps(q_norm, k_norm, eps, qkv))
    implementation = select("rope_write_kv", writer(backend), BACKENDS_QKV, spec).load()
    return implementation(qkv, cos, sin, k_pages, v_pages, write_slots, k_scale, v_scale, q_norm, k_norm, spec=spec)


def _spec(
    heads: tuple[int, int],
    tokens: jax.Array,
    cos: jax.Array | None,
    sin: jax.Array | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    write_slots: jax.Array,
    scales: tuple[jax.Array | None, jax.Array | None],
) -> KVWriteSpec:
    """The static side of a call. heads: of q and of k; tokens: [T, …, head_dim]."""
    count, _, head_dim = tokens.shape
    check_pages(k_pages, v_pages, write_slots, tokens=count, kv_heads=heads[1], head_dim=head_dim)
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected both or neither")
    if cos is not None and sin is not None:
        check_angles(cos, sin, count, head_dim)
    return KVWriteSpec(
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=head_dim,
        dtype=tokens.dtype.name,
        kv_dtype=k_pages.dtype.name,
        page_size=k_pages.shape[2],
        rope=cos is not None,
        kv_scales=any(scale is not None for scale in scales),
    )
