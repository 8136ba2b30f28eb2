"""Copies of KV blocks from their pages to shared memory: one TMA copy per page, inside Mosaic kernels."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.specs import AttentionSpec

GRANULE = 16  # tokens of the smallest page


def page_tokens(spec: AttentionSpec) -> int:
    """Tokens per page of a call that reads pages."""
    if spec.page_size is None:
        raise ValueError("page_size: a paged kernel needs one")
    return spec.page_size


def page_numbers(
    tables: Any, row_offset: jax.Array, block_index: jax.Array, *, page_size: int, block: int
) -> list[jax.Array]:
    """The pages of one block, or of many: row_offset and block_index may be arrays where `tables` is one.

    Args:
      tables: int32 [rows * max_pages], an array or in GMEM; row_offset: where the row's entries begin.
      block_index: which block of `block` tokens of the row.
    """
    # A row's last block may reach past its table's end: whatever page is named there, its tokens are masked.
    last = jnp.int32(tables.shape[0] - 1)
    count = max(1, block // page_size)
    index = row_offset + lax.div(block_index, jnp.full_like(block_index, max(1, page_size // block))) * count
    return [tables[jnp.minimum(index + i, last)] for i in range(count)]


def copy_sources(
    pages: list[jax.Array], block_index: jax.Array, *, page_size: int, block: int, size: int
) -> list[tuple[jax.Array, jax.Array]]:
    """(page, first token inside it) of each copy of one block.

    Args:
      pages: `page_numbers` of the block.
      size: tokens per copy; divides page_size and block.
    """
    # Of the block in its page, where pages are larger.
    begin = lax.rem(block_index, jnp.int32(max(1, page_size // block))) * block
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

    count: tokens of the block that exist; granules wholly past them are left out, and smem keeps what it held there.
    """
    size = smem.shape[0] // len(sources)
    for i, (page, token) in enumerate(sources):

        def copy(tokens: int, page: Any = page, token: Any = token, first: int = i * size) -> None:
            source, target = pages_ref.at[page, head, pl.ds(token, tokens)], smem.at[pl.ds(first, tokens)]
            plgpu.copy_gmem_to_smem(source, target, barrier)

        if count is None:
            copy(size)
            continue
        # One copy of the right size, not one per granule: all of a warpgroup's threads arrive with each.
        left = count - i * size
        for tokens in range(GRANULE, size, GRANULE):
            above = left > tokens - GRANULE
            pl.when(((left <= tokens) & above) if i or tokens > GRANULE else left <= tokens)(
                functools.partial(copy, tokens)
            )
        pl.when(left > size - GRANULE)(functools.partial(copy, size))
        if i:
            pl.when(left <= 0)(functools.partial(plgpu.barrier_arrive, barrier))
