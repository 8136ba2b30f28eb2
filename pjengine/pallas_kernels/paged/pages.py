"""Copies of KV blocks from their pages to shared memory: one TMA copy per page, inside Mosaic kernels."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

GRANULE = 16  # tokens of the smallest page


def copy_sources(
    tables_ref: Any, row_offset: jax.Array, block_index: jax.Array, *, page_size: int | None, block: int, size: int
) -> list[tuple[jax.Array, jax.Array]]:
    """(page, first token inside it) of each copy of one block; all read before any copy, so that the reads overlap.

    Args:
      tables_ref: int32 [rows * max_pages] in GMEM; row_offset: where the row's entries begin.
      block_index: which block of `block` tokens of the row.
      size: tokens per copy; divides page_size and block.
    """
    if page_size is None:
        raise ValueError("page_size: a paged kernel needs one")
    # A row's last block may reach past its table's end: whatever page is named there, its tokens are masked.
    last = jnp.int32(tables_ref.shape[0] - 1)
    pages_per_block = max(1, block // page_size)
    blocks_per_page = jnp.int32(max(1, page_size // block))
    index = row_offset + lax.div(block_index, blocks_per_page) * pages_per_block
    pages = [tables_ref[jnp.minimum(index + i, last)] for i in range(pages_per_block)]
    begin = lax.rem(block_index, blocks_per_page) * block  # of the block in its page, where pages are larger
    return [(pages[start // page_size], begin + start % page_size) for start in range(0, block, size)]


def copy_block(
    pages_ref: Any,
    sources: list[tuple[jax.Array, jax.Array]],
    head: jax.Array,
    smem: Any,
    barrier: Any,
    count: jax.Array | None = None,
) -> None:
    """Starts the copies of one head's block into smem [block, head_dim]; each arrives once at `barrier`.

    count: tokens of the block that exist; copies wholly past them are left out, and smem keeps what it held there.
    """
    size = smem.shape[0] // len(sources)
    for i, (page, token) in enumerate(sources):
        source, target = pages_ref.at[page, head, pl.ds(token, size)], smem.at[pl.ds(i * size, size)]
        if count is None or i == 0:
            plgpu.copy_gmem_to_smem(source, target, barrier)
            continue
        exists = i * size < count
        pl.when(exists)(functools.partial(plgpu.copy_gmem_to_smem, source, target, barrier))
        pl.when(jnp.logical_not(exists))(functools.partial(plgpu.barrier_arrive, barrier))
