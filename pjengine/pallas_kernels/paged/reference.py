"""jnp reference of `paged_attention`, also the CPU path: the work follows the ragged lengths, not the padded shapes.

Both loops have data-dependent trip counts, so there is no reverse-mode gradient; `packed_attention` has one.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.masking import MASKED, cap_scores, first_visible, visible
from pjengine.pallas_kernels.specs import AttentionSpec

KV_BLOCK = 128  # tokens per step of the online softmax
QUERY_BLOCK = 64  # queries per work item of rows with several queries

# A dot of float32 operands must not fall to TF32 on a GPU.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    query_starts: jax.Array,
    kv_lens: jax.Array,
    block_tables: jax.Array,
    sinks: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    *,
    spec: AttentionSpec,
    scale: float,
) -> jax.Array:
    """See `pjengine.pallas_kernels.paged_attention`."""
    keys, values = _Pages(k_pages, k_scale), _Pages(v_pages, v_scale)
    attend = functools.partial(_attend, keys, values, sinks, spec, scale)
    tables = _pad_to_multiple(block_tables, max(1, KV_BLOCK // keys.page_size))
    if spec.decode:
        return attend(q[:, None], kv_lens - 1, kv_lens, tables)[:, 0]

    counts = query_starts[1:] - query_starts[:-1]
    # Rows of one query (decode rows riding along) go through the batched path together, the others block by block.
    single_lens = jnp.where(counts == 1, kv_lens, 0)
    singles = attend(q[query_starts[:-1], None], single_lens - 1, single_lens, tables)[:, 0]
    out = _blocks(attend, q, query_starts, jnp.where(counts > 1, counts, 0), kv_lens, tables)
    return out.at[jnp.where(counts == 1, query_starts[:-1], q.shape[0])].set(singles, mode="drop")


def _blocks(
    attend: Any, q: jax.Array, query_starts: jax.Array, counts: jax.Array, kv_lens: jax.Array, tables: jax.Array
) -> jax.Array:
    """Attention of rows with `counts` queries: a loop over a work list of (row, block of queries)."""
    size = min(QUERY_BLOCK, q.shape[0])
    ends = jnp.cumsum(-(-counts // size))  # work items up to and including each row

    def one(item: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.searchsorted(ends, item, side="right")
        offset = (item - jnp.where(row > 0, ends[row - 1], 0)) * size
        start = query_starts[row] + offset
        block = lax.dynamic_slice_in_dim(padded, start, size)
        first = kv_lens[row] - counts[row] + offset
        table = lax.dynamic_slice_in_dim(tables, row, 1)
        result = attend(block[None], first[None], kv_lens[row][None], table)[0]
        # A short last block also overwrites tokens of later rows; those rows' own blocks come later in the list.
        keep = (jnp.arange(size) < counts[row] - offset)[:, None, None]
        return lax.dynamic_update_slice_in_dim(out, jnp.where(keep, result, 0), start, axis=0)

    padded = jnp.pad(q, ((0, size), (0, 0), (0, 0)))
    return lax.fori_loop(0, ends[-1], one, jnp.zeros_like(padded))[: q.shape[0]]


class _Pages:
    """A page pool seen as [pages * kv_heads, page_size, head_dim], so that a gather needs no transpose after it."""

    def __init__(self, pages: jax.Array, scale: jax.Array | None):
        self.kv_heads, self.page_size = pages.shape[1], pages.shape[2]
        self._flat = pages.reshape(-1, *pages.shape[2:])
        self._scale = None if scale is None else jnp.broadcast_to(scale, (self.kv_heads,)).astype(jnp.float32)

    def gather(self, page_ids: jax.Array) -> jax.Array:
        """float32 [rows, kv_heads, n * page_size, head_dim] of page_ids [rows, n], dequantised."""
        index = page_ids[:, None, :] * self.kv_heads + jnp.arange(self.kv_heads)[None, :, None]
        rows, kv_heads, n = index.shape
        tokens = self._flat.at[index].get(mode="promise_in_bounds")
        tokens = tokens.reshape(rows, kv_heads, n * self.page_size, -1).astype(jnp.float32)
        return tokens if self._scale is None else tokens * self._scale[:, None, None]


def _attend(
    keys: _Pages,
    values: _Pages,
    sinks: jax.Array | None,
    spec: AttentionSpec,
    scale: float,
    q: jax.Array,
    first: jax.Array,
    kv_lens: jax.Array,
    tables: jax.Array,
) -> jax.Array:
    """Online softmax over KV blocks, vectorised over rows: the trip count is that of the longest row.

    Args:
      q: [rows, n, heads, head_dim]; first: position of each row's first query; kv_lens: [rows], 0 for a row to skip;
      tables: [rows, max_pages], max_pages a multiple of the block's pages.
    Returns: [rows, n, heads, head_dim] in q's dtype.
    """
    rows, n, heads, head_dim = q.shape
    kv_heads, group = spec.kv_heads, spec.group
    block_pages = max(1, KV_BLOCK // keys.page_size)
    block = block_pages * keys.page_size
    grouped = (q.astype(jnp.float32) * scale).reshape(rows, n, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(rows, kv_heads, group * n, head_dim)
    positions = first[:, None] + jnp.arange(n)  # [rows, n]
    query_positions = jnp.tile(positions, (1, group))[:, None, :, None]

    def step(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, acc = state
        page_ids = lax.dynamic_slice_in_dim(tables, index * block_pages, block_pages, axis=1)
        key_positions = index * block + jnp.arange(block)
        written = key_positions < kv_lens[:, None]  # [rows, block]
        mask = visible(query_positions, key_positions, causal=True, window=spec.window, chunk=spec.chunk)
        mask &= written[:, None, None, :]
        scores = cap_scores(_einsum("rkqd,rksd->rkqs", grouped, keys.gather(page_ids)), spec.soft_cap)
        scores = jnp.where(mask, scores, MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0)
        rescale = jnp.exp(top - new_top)
        value = jnp.where(written[:, None, :, None], values.gather(page_ids), 0)  # 0 * NaN is NaN: clear them first
        acc = acc * rescale[..., None] + _einsum("rkqs,rksd->rkqd", weights, value)
        return new_top, total * rescale + weights.sum(-1), acc

    shape = (rows, kv_heads, group * n)
    if sinks is None:
        top, total = jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    else:
        per_head = jnp.repeat(sinks.astype(jnp.float32).reshape(kv_heads, group), n, axis=1)
        top, total = jnp.broadcast_to(per_head, shape), jnp.ones(shape, jnp.float32)
    reached = jnp.where(kv_lens > 0, first_visible(jnp.maximum(first, 0), window=spec.window, chunk=spec.chunk), 2**30)
    longest = jnp.maximum(kv_lens.max(), 0)
    begin = jnp.minimum(reached.min(), longest) // block
    state = (top, total, jnp.zeros((*shape, head_dim), jnp.float32))
    _, total, acc = lax.fori_loop(begin, -(-longest // block), step, state)
    out = acc / jnp.where(total == 0, 1, total)[..., None]
    out = out.reshape(rows, kv_heads, group, n, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(rows, n, heads, head_dim).astype(q.dtype)


def _pad_to_multiple(tables: jax.Array, multiple: int) -> jax.Array:
    """Block tables with columns of page 0 appended up to a multiple."""
    return jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % multiple)))
