"""A decode worker's share of the line of KV blocks, as runs of blocks of single (row, KV head) pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.paged.decode_plan import WorkerFields, first_key
from pjengine.pallas_kernels.specs import AttentionSpec


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of KV blocks of one (row, KV head) pair inside one worker's share. All are scalars inside the kernel.

    Attributes:
      ordinal: runs, and step: blocks, that this worker had before.
      row, head: the pair; length: the row's KV tokens; origin, row_blocks: where the pair begins in the line, and how
        many blocks it has.
      first, blocks: the run.
      opens: it begins where the pair begins; whole: it is all of the pair.
    """

    ordinal: jax.Array
    step: jax.Array
    row: jax.Array
    head: jax.Array
    length: jax.Array
    origin: jax.Array
    row_blocks: jax.Array
    first: jax.Array
    blocks: jax.Array
    opens: jax.Array
    whole: jax.Array


def for_each_segment(
    body: Callable[[Segment], None], own: WorkerFields, starts_ref: Any, lens_ref: Any, spec: AttentionSpec, block: int
) -> None:
    """Calls body for every segment of a worker's share, in the same order in both of its warpgroups.

    Args:
      own: the worker's fields; starts_ref: the plan's starts; lens_ref: KV tokens of each row; block: its tokens.
    """
    rows = lens_ref.shape[0]

    def one(state: Any) -> Any:
        position, row, head, ordinal, step, ends, lengths = state
        start, end_of_row, end_of_next = ends
        length, next_length = lengths
        # Read early, used in the next turn: a dependent read here would cost its latency in every turn.
        later = jnp.minimum(row + 2, rows)
        after_next, later_length = starts_ref[jnp.minimum(later + 1, rows)], lens_ref[jnp.minimum(later, rows - 1)]
        row_blocks = end_of_row - start
        origin = start * spec.kv_heads + head * row_blocks
        blocks = jnp.minimum(own.end, origin + row_blocks) - position
        first = lax.div(first_key(length, spec), jnp.int32(block)) + position - origin
        opens = position == origin
        whole = opens & (blocks == row_blocks)
        segment = Segment(ordinal, step, row, head, length, origin, row_blocks, first, blocks, opens, whole)
        pl.when(blocks > 0)(lambda: body(segment))
        last = (head == spec.kv_heads - 1) | (row_blocks == 0)
        ends = tuple(
            jnp.where(last, new, old)
            for new, old in zip((end_of_row, end_of_next, after_next), (start, end_of_row, end_of_next), strict=True)
        )
        lengths = (jnp.where(last, next_length, length), jnp.where(last, later_length, next_length))
        row, head = jnp.where(last, row + 1, row), jnp.where(last, 0, head + 1)
        return position + blocks, row, head, ordinal + (blocks > 0).astype(jnp.int32), step + blocks, ends, lengths

    start = (own.begin, own.row, own.head, jnp.int32(0), jnp.int32(0), own.starts, own.lengths)
    lax.while_loop(lambda state: state[0] < own.end, one, start)
