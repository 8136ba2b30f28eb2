"""Random ragged batches and a float64 NumPy oracle, shared by the CPU and GPU tests of every backend."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class PagedCase:
    """Arguments of one `paged_attention` call, as NumPy arrays (q and pages float32, already rounded to `dtype`)."""

    q: np.ndarray
    k_pages: np.ndarray
    v_pages: np.ndarray
    query_starts: np.ndarray
    kv_lens: np.ndarray
    block_tables: np.ndarray
    scale: float
    dtype: str
    kv_dtype: str

    def arrays(self) -> tuple[Any, ...]:
        """The positional arguments of `paged_attention`, on the default device."""
        return (
            jnp.asarray(self.q, self.dtype),
            jnp.asarray(self.k_pages, self.kv_dtype),
            jnp.asarray(self.v_pages, self.kv_dtype),
            jnp.asarray(self.query_starts),
            jnp.asarray(self.kv_lens),
            jnp.asarray(self.block_tables),
        )

    def last_slots(self) -> np.ndarray:
        """int32 [R]: page * page_size + offset of each row's last KV token, -1 for a row without any."""
        page_size, last = self.k_pages.shape[2], np.maximum(self.kv_lens - 1, 0)
        pages = self.block_tables[np.arange(len(last)), last // page_size]
        return np.where(self.kv_lens > 0, pages * page_size + last % page_size, -1).astype(np.int32)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x as float32 after a trip through `dtype`."""
    return np.asarray(jnp.asarray(x, dtype).astype(jnp.float32))


def paged_case(
    rng: np.random.Generator,
    query_lens: list[int],
    kv_lens: list[int],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: str = "float32",
    kv_dtype: str | None = None,
    padding_rows: int = 0,
    padding_tokens: int = 0,
    pages: int | None = None,
    max_pages: int | None = None,
    shared_prefix_pages: int = 0,
) -> PagedCase:
    """A batch with shuffled pages; page 0, spare pages and the tails of last pages hold NaN.

    Args:
      pages, max_pages: fix the shapes of the pools and block tables; None: a few more than needed.
      shared_prefix_pages: so many leading pages of each row (as far as it has them, whole) are row 0's.
    """
    kv_dtype = kv_dtype or dtype
    rows = len(kv_lens) + padding_rows
    needed = [-(-max(n, 0) // page_size) for n in kv_lens]
    pages = pages or 4 + sum(needed)
    order = rng.permutation(np.arange(1, pages))
    max_pages = max_pages or max([*needed, 1]) + 1
    tables = np.zeros((rows, max_pages), np.int32)
    used = 0
    for r, count in enumerate(needed):
        tables[r, :count] = order[used : used + count]
        used += count
        shared = min(shared_prefix_pages, kv_lens[r] // page_size, needed[0] if r else 0)
        tables[r, :shared] = tables[0, :shared]
    shape = (pages, kv_heads, page_size, head_dim)
    k = rounded(rng.standard_normal(shape, np.float32), kv_dtype)
    v = rounded(rng.standard_normal(shape, np.float32), kv_dtype)
    written = np.zeros((pages, page_size), bool)
    for r, n in enumerate(kv_lens):
        for position in range(n):
            written[tables[r, position // page_size], position % page_size] = True
    k, v = (np.where(written[:, None, :, None], x, np.float32(np.nan)) for x in (k, v))
    tokens = sum(query_lens) + padding_tokens
    starts = np.cumsum([0, *query_lens, *[0] * padding_rows]).astype(np.int32)
    return PagedCase(
        q=rounded(rng.standard_normal((tokens, heads, head_dim), np.float32), dtype),
        k_pages=k,
        v_pages=v,
        query_starts=starts,
        kv_lens=np.array([*kv_lens, *[0] * padding_rows], np.int32),
        block_tables=tables,
        scale=head_dim**-0.5,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )


def random_lens(rng: np.random.Generator, rows: int, longest: int) -> tuple[list[int], list[int]]:
    """(query_lens, kv_lens) of a mixture: decode rows, whole prompts, chunks after a prefix, rows without queries."""
    query_lens, kv_lens = [], []
    for kind in rng.integers(0, 5, rows):
        kv = int(rng.integers(1, longest + 1))
        query = {0: 1, 1: 1, 2: kv, 3: int(rng.integers(1, kv + 1)), 4: 0}[int(kind)]
        query_lens.append(query)
        kv_lens.append(kv if query else 0)
    return query_lens, kv_lens


def oracle_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    first: int = 0,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    soft_cap: float | None = None,
    sinks: np.ndarray | None = None,
    relative_bias: np.ndarray | None = None,
) -> np.ndarray:
    """One sequence in float64: q [n, heads, d] at positions first..; k, v [m, kv_heads, d]. Returns [n, heads, d]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for i in range(q.shape[0]):
        p = first + i
        j = np.arange(k.shape[0])
        keep = np.ones(len(j), bool)
        if causal:
            keep &= j <= p
        if window is not None:
            keep &= np.abs(p - j) < window if not causal else p - j < window
        if chunk is not None:
            keep &= j // chunk == p // chunk
        for h in range(q.shape[1]):
            s = k[keep, h // group] @ q[i, h] * scale
            if soft_cap is not None:
                s = soft_cap * np.tanh(s / soft_cap)
            if relative_bias is not None:
                reach = relative_bias.shape[1] // 2
                s = s + relative_bias[h, np.clip(j[keep] - p, -reach, reach) + reach]
            extra = [] if sinks is None else [np.float64(sinks[h])]
            top = max([*s, *extra])
            w = np.exp(s - top)
            out[i, h] = w @ v[keep, h // group] / (w.sum() + sum(np.exp(e - top) for e in extra))
    return out


def oracle_paged(case: PagedCase, *, k_scale: Any = None, v_scale: Any = None, **options: Any) -> np.ndarray:
    """The float64 result for every real token of a case: [query_starts[-1], heads, head_dim]."""
    page_size, kv_heads = case.k_pages.shape[2], case.k_pages.shape[1]
    scales = [np.broadcast_to(1.0 if s is None else np.asarray(s), (kv_heads,)) for s in (k_scale, v_scale)]
    out = np.zeros((int(case.query_starts[-1]), *case.q.shape[1:]))
    for r, n in enumerate(case.kv_lens):
        begin, end = case.query_starts[r], case.query_starts[r + 1]
        if n <= 0 or begin == end:
            continue
        position = np.arange(n)
        page, offset = case.block_tables[r, position // page_size], position % page_size
        k = case.k_pages[page, :, offset] * scales[0][:, None]
        v = case.v_pages[page, :, offset] * scales[1][:, None]
        out[begin:end] = oracle_attention(
            case.q[begin:end], k, v, scale=case.scale, first=int(n - (end - begin)), **options
        )
    return out


def relative_error(actual: Any, expected: np.ndarray) -> float:
    """‖actual - expected‖ / ‖expected‖; infinity where anything is not finite."""
    actual = np.asarray(actual, np.float64)
    if not np.isfinite(actual).all():
        return float("inf")
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(actual - expected) / norm) if norm else float(np.linalg.norm(actual))
