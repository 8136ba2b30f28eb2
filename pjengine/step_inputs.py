"""The device-side pytrees that kernels, models and the runner share.

One step is one ragged "super-sequence": the queries of all rows stand one after the other, with no padding between
them. T is the bucket's token count, R its row count. Rows past the last real one have no queries and `kv_lens` 0;
tokens past
`query_starts[R]` are padding: their outputs are unspecified but finite and nobody reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What one layer keeps per token. Layers with equal `window` share a group: one block table, one free list.

    Attributes:
      kv_heads: KV heads kept per token.
      head_dim: elements per head.
      window: a query at position p sees keys at positions (p - window, p]; None sees all. Pages wholly outside every
        future query's window are freed.
    """

    kv_heads: int
    head_dim: int
    window: int | None = None


def cache_groups(specs: Sequence[CacheSpec]) -> tuple[int, ...]:
    """Group of each layer: layers with the same window share one, numbered in order of first appearance."""
    windows = list(dict.fromkeys(spec.window for spec in specs))
    return tuple(windows.index(spec.window) for spec in specs)


@struct.dataclass
class LayerCache:
    """One layer's pages, never stacked with other layers'. Page 0 is never handed out: padding points at it."""

    k: jax.Array  # [pages, kv_heads, page_size, head_dim]
    v: jax.Array  # [pages, kv_heads, page_size, head_dim]


@struct.dataclass
class KVCache:
    """The paged KV cache of a model, donated to each step and updated in place."""

    layers: tuple[LayerCache, ...]
    groups: tuple[int, ...] = struct.field(pytree_node=False)  # group of each layer: which block table it reads


@struct.dataclass
class StepInputs:
    """Everything a model's `forward` reads besides parameters and cache; built by the runner, static-shaped."""

    token_ids: jax.Array  # int32 [T]
    positions: jax.Array  # int32 [T], of each token in its own sequence
    query_starts: jax.Array  # int32 [R + 1]: row r's tokens are [query_starts[r], query_starts[r + 1])
    kv_lens: jax.Array  # int32 [R]: KV tokens each row sees, this step's own included
    write_slots: tuple[jax.Array, ...] = ()  # per group int32 [T]: page * page_size + offset; negative: not written
    block_tables: tuple[jax.Array, ...] = ()  # per group int32 [R, max_pages]: pages of positions 0.. in order
    token_types: jax.Array | None = None  # int32 [T]: BERT segments; None means all 0
    decode: bool = struct.field(pytree_node=False, default=False)  # every row has one query (T == R): row r is token r
    backend: str = struct.field(pytree_node=False, default="auto")  # attention backend, as --attention-backend
    # Every product is compiled to cuBLAS's: an activation that its epilogue knows may be written in that form.
    epilogues: bool = struct.field(pytree_node=False, default=False)

    @property
    def last_tokens(self) -> jax.Array:
        """int32 [R]: index of each row's last token (clamped to 0 for rows without one)."""
        return jnp.maximum(self.query_starts[1:] - 1, 0)


def packed_inputs(sequences: Sequence[Sequence[int]], backend: str = "auto") -> StepInputs:
    """StepInputs of whole sequences packed one after the other, for a `forward` without a cache.

    Args:
      sequences: token ids, one list per sequence, none empty.
      backend: attention backend; "reference" is differentiable everywhere.
    """
    lengths = [len(s) for s in sequences]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"sequences: need at least one and none empty, got lengths {lengths}")
    return StepInputs(
        token_ids=jnp.asarray(np.concatenate([np.asarray(s, np.int32) for s in sequences])),
        positions=jnp.asarray(np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])),
        query_starts=jnp.asarray(np.cumsum([0, *lengths]), jnp.int32),
        kv_lens=jnp.asarray(lengths, jnp.int32),
        backend=backend,
    )
