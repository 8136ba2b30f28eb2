"""`paged_attention` and `paged_attention_qkv`: the public ops, their argument checks and their backends."""

from __future__ import annotations

import importlib

import jax

from pjengine.pallas_kernels.backends import Backend, accept, current_target, select
from pjengine.pallas_kernels.fused import query_heads
from pjengine.pallas_kernels.head_norms import head_norm_eps
from pjengine.pallas_kernels.kv_write.api import rope_write_kv_qkv
from pjengine.pallas_kernels.kv_write.support import check_pages
from pjengine.pallas_kernels.paged.support import fused_refusal, mosaic_refusal
from pjengine.pallas_kernels.rope import check_angles
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


def paged_attention_qkv(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    write_slots: jax.Array,
    query_starts: jax.Array,
    kv_lens: jax.Array,
    block_tables: jax.Array,
    *,
    scale: float,
    decode: bool = False,
    window: int | None = None,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`rope_write_kv_qkv` and `paged_attention` of what it rotates and writes: in one kernel where one serves both.

    Args:
      write_slots: as in `rope_write_kv`. No row sees a token that another row of the call writes, and, with `decode`,
        row r's slot is that of its last position, kv_lens[r] - 1, in its pages (any, if kv_lens[r] is not positive).
      The others: as in `rope_write_kv_qkv` and `paged_attention`.
    Returns: (attended [T, heads, head_dim], k_pages, v_pages); in place where k_pages and v_pages are donated.
    Raises: as the two.
    """
    kv_heads = k_pages.shape[1]
    q = jax.ShapeDtypeStruct((qkv.shape[0], query_heads(qkv, kv_heads), qkv.shape[2]), qkv.dtype)
    norm_eps = head_norm_eps(q_norm, k_norm, eps, qkv)
    spec = AttentionSpec(
        heads=q.shape[1],
        kv_heads=kv_heads,
        head_dim=q.shape[2],
        dtype=q.dtype.name,
        kv_dtype=k_pages.dtype.name,
        page_size=k_pages.shape[2],
        decode=decode,
        window=window,
    )
    refusal = fused_refusal(spec, current_target(), norm=norm_eps is not None)
    if backend in ("auto", "mosaic") and refusal is None:
        _check(q, k_pages, v_pages, query_starts, kv_lens, block_tables, decode, None)
        check_angles(cos, sin, q.shape[0], q.shape[2])
        check_pages(k_pages, v_pages, write_slots, tokens=q.shape[0], kv_heads=kv_heads, head_dim=q.shape[2])
        mosaic = importlib.import_module("pjengine.pallas_kernels.paged.mosaic")
        norms = () if q_norm is None else (q_norm, k_norm)
        served: tuple[jax.Array, jax.Array, jax.Array] = mosaic.paged_attention_qkv(
            qkv,
            cos,
            sin,
            k_pages,
            v_pages,
            write_slots,
            kv_lens,
            block_tables,
            norms,
            spec=spec,
            scale=scale,
            norm_eps=norm_eps,
        )
        return served
    rotated, k_pages, v_pages = rope_write_kv_qkv(
        qkv, cos, sin, k_pages, v_pages, write_slots, q_norm=q_norm, k_norm=k_norm, eps=eps, backend=backend
    )
    attended = paged_attention(
        rotated,
        k_pages,
        v_pages,
        query_starts,
        kv_lens,
        block_tables,
        scale=scale,
        decode=decode,
        window=window,
        backend=backend,
    )
    return attended, k_pages, v_pages


def _check(
    q: jax.Array | jax.ShapeDtypeStruct,
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
