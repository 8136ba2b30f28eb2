"""`packed_attention`: the public op, its argument checks and its backends."""

from __future__ import annotations

import jax

from pjengine.pallas_kernels.backends import Backend, accept, select
from pjengine.pallas_kernels.packed.support import mosaic_refusal
from pjengine.pallas_kernels.specs import AttentionSpec
from pjengine.pallas_kernels.triton_support import triton_refusal

BACKENDS = (
    Backend(
        "mosaic",
        mosaic_refusal,
        "pjengine.pallas_kernels.packed.mosaic",
        "packed_attention",
        passed_over="its results are not yet checked on a GPU; --attention-backend mosaic asks for it",
    ),
    Backend("triton", triton_refusal, "pjengine.pallas_kernels.packed.triton", "packed_attention"),
    Backend("reference", accept, "pjengine.pallas_kernels.packed.reference", "packed_attention"),
)


def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_starts: jax.Array,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Attention inside each of the sequences that stand one after the other in one packed batch; no cache.

    Args:
      q: [T, heads, head_dim], bfloat16, float16 or float32.
      k, v: [T, kv_heads, head_dim] in q's dtype; query head h reads KV head h // (heads // kv_heads).
      query_starts: int32 [R + 1], not decreasing, first 0: sequence r is the tokens [query_starts[r],
        query_starts[r + 1]). Tokens past the last one are padding.
      scale: multiplies q·k before the softmax.
      causal: a token sees no later one.
      window: a token at position p sees (p - window, p], where not causal (p - window, p + window).
      soft_cap, sinks, backend: as in `paged_attention`.
    Returns: [T, heads, head_dim] in q's dtype; accumulated in float32. Padding tokens: unspecified but finite. The
      reference backend is differentiable in q, k, v and sinks.
    Raises:
      ValueError: shapes or dtypes that contradict each other.
      ConfigError, KernelUnavailable: see backends.select.
    """
    if q.ndim != 3 or k.ndim != 3 or v.shape != k.shape:
        raise ValueError(f"q, k, v: expected [T, heads, head_dim] each, k as v, got {q.shape}, {k.shape}, {v.shape}")
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: {k.shape} does not fit q {q.shape}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks: expected [{q.shape[1]}], got {sinks.shape}")
    spec = AttentionSpec(
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[2],
        dtype=q.dtype.name,
        kv_dtype=k.dtype.name,
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks is not None,
    )
    implementation = select("packed_attention", backend, BACKENDS, spec).load()
    return implementation(q, k, v, query_starts, sinks, spec=spec, scale=scale)
