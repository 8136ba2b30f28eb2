"""How the decode kernel's work is cut: an even cut of the line of KV blocks, and what each worker reads first."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pjengine.pallas_kernels.masking import first_visible
from pjengine.pallas_kernels.paged.pages import page_numbers, page_tokens
from pjengine.pallas_kernels.specs import AttentionSpec


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Tuning of the kernel.

    Attributes:
      block: KV tokens per step of a worker, a multiple of 64.
      stages: blocks of K, and of V, in flight per worker.
      workers: per SM.
      sms: streaming multiprocessors of the device.
      copy_registers, compute_registers: per thread of the two kinds of warpgroups.
      least_share: blocks of a worker's piece of the line, unless nothing is left.
      whole_blocks: (row, KV head) pairs of at most so many blocks are not cut: all is the worker's in whose piece they
        end.
      unroll: pieces of a cut pair whose loads are in flight together.
    """

    block: int
    stages: int
    workers: int
    sms: int
    copy_registers: int = 56
    compute_registers: int = 192
    least_share: int = 1
    whole_blocks: int = 0
    unroll: int = 16


Plan = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class WorkerFields:
    """One row of the plan's table of workers: all that a worker needs for its first copy, in one read.

    Attributes:
      begin, end: its piece of the line; row, head: the pair that it begins in.
      share: blocks from one worker's begin to the next one's, before cuts were moved out of short pairs.
      starts: of row, row + 1 and row + 2; lengths: KV tokens of row and row + 1.
      pages: of the first block.
    """

    begin: jax.Array
    end: jax.Array
    row: jax.Array
    head: jax.Array
    share: jax.Array
    starts: tuple[jax.Array, ...]
    lengths: tuple[jax.Array, ...]
    pages: tuple[jax.Array, ...]


def worker_fields(values: list[jax.Array]) -> WorkerFields:
    """A row of the table by name."""
    begin, end, row, head, share = values[:5]
    return WorkerFields(begin, end, row, head, share, tuple(values[5:8]), tuple(values[8:10]), tuple(values[10:]))


def decode_plan(kv_lens: jax.Array, block_tables: jax.Array, spec: AttentionSpec, config: DecodeConfig) -> Plan:
    """What the kernels need to know about lengths; equal for all layers with one spec, so XLA computes it once a step.

    Args:
      kv_lens: int32 [R]; block_tables: int32 [R, max_pages].
    Returns:
      starts: int32 [R + 1], exclusive cumulative sum of each row's blocks (of one head);
      shares: int32 [workers, n]: `worker_fields` of each worker;
      counters: int32 [R * kv_heads] zeros: the kernel counts a pair's pieces there and leaves zeros behind.
    """
    rows = kv_lens.shape[0]
    first = first_key(kv_lens, spec) // config.block
    blocks = jnp.maximum(-(-kv_lens // config.block) - first, 0)
    # A sum per row, not a running sum: one kernel instead of a chain of them.
    index = jnp.arange(rows + 1, dtype=jnp.int32)
    starts = jnp.sum(jnp.where(index[None, :-1] < index[:, None], blocks, 0), axis=1, dtype=jnp.int32)
    line = starts * spec.kv_heads
    workers = config.sms * config.workers
    share = jnp.maximum(-(-line[-1] // workers), config.least_share)
    longest = jnp.max(blocks)
    share = jnp.maximum(share, jnp.where(longest <= config.whole_blocks, longest, 0))
    begins = jnp.minimum(jnp.arange(workers + 1, dtype=jnp.int32) * share, line[-1])
    row = jnp.minimum(jnp.sum(line[None, 1:] <= begins[:, None], axis=1, dtype=jnp.int32), rows - 1)
    pair_blocks = starts[row + 1] - starts[row]
    head = (begins - line[row]) // jnp.maximum(pair_blocks, 1)
    # What a cut costs, partial results written and combined, is more than the blocks by which shares become uneven.
    begins = jnp.where(pair_blocks <= config.whole_blocks, line[row] + head * pair_blocks, begins)
    begin, row, head = begins[:-1], row[:-1], head[:-1]
    row_start, row_end, next_end = (starts[jnp.minimum(row + i, rows)] for i in range(3))
    length, next_length = (kv_lens[jnp.minimum(row + i, rows - 1)] for i in range(2))
    block = first[row] + begin - row_start * spec.kv_heads - head * (row_end - row_start)
    pages = page_numbers(
        block_tables.reshape(-1),
        row * block_tables.shape[1],
        block,
        page_size=page_tokens(spec),
        block=config.block,
    )
    shares = jnp.broadcast_to(share, begin.shape)
    fields = (begin, begins[1:], row, head, shares, row_start, row_end, next_end, length, next_length, *pages)
    return starts, jnp.stack(fields, axis=1), jnp.zeros(rows * spec.kv_heads, jnp.int32)


def first_key(kv_lens: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Position of the first key that the last query of a row sees."""
    return first_visible(jnp.maximum(kv_lens - 1, 0), window=spec.window, chunk=spec.chunk)
