"""`paged_attention`: the public op, its argument checks and its backends."""

from __future__ import annotations

import jax

from pjengine.pallas_kernels.backends import Backend, accept, select
from pjengine.pallas_kernels.paged.support import mosaic_refusal
from pjengine.pallas_kernels.specs import AttentionSpec
from pjengine.pallas_kernels.triton_support import triton_refusal

BACKENDS = (
    Backend("mosaic", mosaic_refusal, "pjengine.pallas_kernels.paged.mosaic", "paged_attention"),
    Backend("triton", triton_refusal, "pjengine.pallas_kernels.paged.triton", "paged_attention"),
    Backend("reference", accept, "pjengine.pallas_kernels.paged.reference", "paged_attention"),
)


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    query_starts: jax.Array,
    kv_lens: jax.Array,
    block_tables: jax.Array,
    *,
    scale: float,
    decode: bool = False,
    window: int | None = None,
    chunk: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Causal attention of a ragged batch of queries over a paged KV cache (Kwon et al. 2023, arXiv:2309.06180).

    Row r owns the queries [query_starts[r], query_starts[r + 1]) and sees the KV tokens at positions [0, kv_lens[r]) of
    its pages. Queries are aligned at the end: query i of n is at position kv_lens[r] - n + i. That covers decode (one
    query), prefill (n == kv_lens[r]), chunked prefill and any mixture of them.

    Args:
      q: [T, heads, head_dim], bfloat16, float16 or float32.
      k_pages, v_pages: [pages, kv_heads, page_size, head_dim] in q's dtype or float8_e4m3fn; kv_heads divides heads,
        and query head h reads KV head h // (heads // kv_heads). Contents past a row's kv_len, and of pages no row uses,
        are never part of a result, NaN included.
      query_starts: int32 [R + 1], not decreasing, first 0. Tokens past the last one are padding.
      kv_lens: int32 [R]; 0 (or less) for a padding row: its output is zeros.
      block_tables: int32 [R, max_pages]: entry j of row r is the page of positions [j * page_size,
        (j + 1) * page_size). Entries past a row's pages are any valid page (0).
      scale: multiplies q·k before the softmax.
      decode: static promise that T == R and row r is token r; query_starts is not read then.
      window, chunk, soft_cap: as in AttentionSpec.
      sinks: [heads] logits that join each softmax's denominator (gpt-oss), not scaled, not capped.
      k_scale, v_scale: float32 scalar or [kv_heads]: K is k_pages * k_scale, V is v_pages * v_scale.
      backend: "auto" or a name in backends.NAMES.
    Returns: [T, heads, head_dim] in q's dtype; accumulated in float32. Padding tokens: unspecified but finite.
    Raises:
      ValueError: shapes or dtypes that contradict each other.
      ConfigError, KernelUnavailable: see backends.select.
    """
    _check(q, k_pages, v_pages, query_starts, kv_lens, block_tables, decode, sinks)
    spec = AttentionSpec(
        heads=q.shape[1],
        kv_heads=k_pages.shape[1],
        head_dim=q.shape[2],
        dtype=q.dtype.name,
        kv_dtype=k_pages.dtype.name,
        page_size=k_pages.shape[2],
        decode=decode,
        window=window,
        chunk=chunk,
        soft_cap=soft_cap,
        sinks=sinks is not None,
        kv_scales=k_scale is not None or v_scale is not None,
    )
    implementation = select("paged_attention", backend, BACKENDS, spec).load()
    return implementation(
        q, k_pages, v_pages, query_starts, kv_lens, block_tables, sinks, k_scale, v_scale, spec=spec, scale=scale
    )


def _check(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    query_starts: jax.Array,
    kv_lens: jax.Array,
    block_tables: jax.Array,
    decode: bool,
    sinks: jax.Array | None,
) -> None:
    if q.ndim != 3 or k_pages.ndim != 4:
        raise ValueError(f"q, k_pages: expected 3 and 4 dimensions, got shapes {q.shape} and {k_pages.shape}")
    (tokens, heads, head_dim), rows = q.shape, kv_lens.shape[0]
    if v_pages.shape != k_pages.shape or v_pages.dtype != k_pages.dtype:
        raise ValueError(
            f"v_pages: expected k_pages' {k_pages.shape} {k_pages.dtype}, got {v_pages.shape} {v_pages.dtype}"
        )
    if k_pages.shape[3] != head_dim or heads % k_pages.shape[1]:
        raise ValueError(f"k_pages: head_dim and kv_heads of {k_pages.shape} do not fit q {q.shape}")
    if query_starts.shape != (rows + 1,) or block_tables.ndim != 2 or block_tables.shape[0] != rows:
        raise ValueError(
            f"query_starts, block_tables: expected [{rows + 1}] and [{rows}, max_pages] for {rows} kv_lens,"
            f" got {query_starts.shape} and {block_tables.shape}"
        )
    if decode and tokens != rows:
        raise ValueError(f"decode: needs one query per row, got {tokens} queries for {rows} rows")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks: expected [{heads}], got {sinks.shape}")
