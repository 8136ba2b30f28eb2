"""`packed_attention`: the public op, its argument checks and its backends."""

from __future__ import annotations

from typing import NamedTuple

import jax

from pjengine.pallas_kernels.backends import Backend, accept, select
from pjengine.pallas_kernels.fused import query_heads
from pjengine.pallas_kernels.packed.support import mosaic_refusal
from pjengine.pallas_kernels.specs import AttentionSpec
from pjengine.pallas_kernels.triton_support import triton_refusal

BACKENDS = (
    Backend("mosaic", mosaic_refusal, "pjengine.pallas_kernels.packed.mosaic", "packed_attention"),
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
    relative_bias: jax.Array | None = None,
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
      relative_bias: [heads, 2 * d + 1]: relative_bias[h, d + clip(s - p, -d, d)] is added to the score of the query at
        position p and the key at s, after scale and soft_cap (MPNet, T5).
    Returns: [T, heads, head_dim] in q's dtype; accumulated in float32. Padding tokens: unspecified but finite. The
      reference backend is differentiable in q, k, v, sinks and relative_bias.
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
    options = _Options(scale, causal, window, soft_cap, backend)
    return _attend((q, k, v), q.shape[1], k.shape[1], query_starts, sinks, relative_bias, options)


def packed_attention_qkv(
    qkv: jax.Array,
    query_starts: jax.Array,
    *,
    kv_heads: int,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    relative_bias: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """`packed_attention` of a fused projection, read where it lies: cutting it up first would copy all of it.

    Args:
      qkv: [T, heads + 2 * kv_heads, head_dim]: the heads of q, then those of k, then those of v.
      The others: as in `packed_attention`.
    Returns: [T, heads, head_dim].
    """
    heads = query_heads(qkv, kv_heads)
    options = _Options(scale, causal, window, soft_cap, backend)
    return _attend((qkv,), heads, kv_heads, query_starts, sinks, relative_bias, options)


class _Options(NamedTuple):
    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None
    backend: str


def _attend(
    arrays: tuple[jax.Array, ...],
    heads: int,
    kv_heads: int,
    query_starts: jax.Array,
    sinks: jax.Array | None,
    relative_bias: jax.Array | None,
    options: _Options,
) -> jax.Array:
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks: expected [{heads}], got {sinks.shape}")
    if relative_bias is not None and (relative_bias.shape[0] != heads or relative_bias.shape[1] % 2 == 0):
        raise ValueError(f"relative_bias: expected [{heads}, 2 * d + 1], got {relative_bias.shape}")
    dtype = arrays[0].dtype.name
    spec = AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=arrays[0].shape[2],
        dtype=dtype,
        kv_dtype=dtype,
        causal=options.causal,
        window=options.window,
        soft_cap=options.soft_cap,
        sinks=sinks is not None,
        relative_bias=relative_bias is not None,
    )
    implementation = select("packed_attention", options.backend, BACKENDS, spec).load()
    extra = {} if relative_bias is None else {"relative_bias": relative_bias}
    return implementation(arrays, query_starts, sinks, spec=spec, scale=options.scale, **extra)
