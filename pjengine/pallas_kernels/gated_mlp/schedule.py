"""Which SM computes what of a tiled product: whole tiles in turn, and the tiles that are left over cut along K.

With `tiles` tiles and `workers` workers (clusters of SMs) every worker computes tiles // workers whole tiles. The
tiles left over stand in one line of k-steps, which is cut evenly (stream-K, Osama et al. 2023, arXiv:2301.03598): a
worker's piece begins inside a tile, or ends inside one, or both. Who has the first k-step of a tile owns it, adds up
the other pieces of it and stores it. A worker computes the piece that it does not own first, then its whole tiles, then
the piece that it owns: what the others left for it has been there for long.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The static side.

    Attributes:
      rows, columns: of tiles; group: rows of tiles that are walked together, column by column.
      k_steps: of a tile; workers: how many share the work.
      split: cut the tiles that are left over; otherwise some workers get a whole one.
    """

    rows: int
    columns: int
    group: int
    k_steps: int
    workers: int
    split: bool

    @property
    def tiles(self) -> int:
        return self.rows * self.columns

    @property
    def whole(self) -> int:
        """Whole tiles of every worker."""
        return self.tiles // self.workers

    @property
    def cut(self) -> int:
        """Tiles that are cut."""
        return self.tiles % self.workers if self.split else 0

    @property
    def share(self) -> int:
        """k-steps of a worker's piece of the line."""
        return math.ceil(self.cut * self.k_steps / self.workers)

    @property
    def segments(self) -> int:
        """Segments of a worker."""
        if self.cut:
            return self.whole + 2
        return math.ceil(self.tiles / self.workers)


class Segment(NamedTuple):
    """Some k-steps of one tile, int32 scalars.

    Attributes:
      row, column: of the tile; begin, end: its k-steps, none where they are equal.
      owned: 1 where this worker stores the tile; helpers: how many workers behind this one have pieces of it.
    """

    row: Any
    column: Any
    begin: Any
    end: Any
    owned: Any
    helpers: Any


def segment_of(schedule: Schedule, worker: Any, index: Any) -> Segment:
    """Segment number `index` of a worker."""
    steps = jnp.int32(schedule.k_steps)
    if not schedule.cut:
        tile = index * schedule.workers + worker
        end = jnp.where(tile < schedule.tiles, steps, 0)
        return Segment(*_place(schedule, tile), jnp.int32(0), end, jnp.int32(1), jnp.int32(0))
    share, first_cut = schedule.share, schedule.whole * schedule.workers
    line = schedule.cut * schedule.k_steps
    begin = jnp.minimum(worker * share, line)
    end = jnp.minimum(begin + share, line)
    boundary = lax.div(begin + (schedule.k_steps - 1), steps) * steps  # first begin of a tile in the piece or behind
    opens, closes = index == 0, index == schedule.whole + 1
    first = Segment(
        *_place(schedule, first_cut + lax.div(begin, steps)),
        begin - lax.div(begin, steps) * steps,
        begin - lax.div(begin, steps) * steps + jnp.maximum(jnp.minimum(end, boundary) - begin, 0),
        jnp.int32(0),
        jnp.int32(0),
    )
    last = Segment(
        *_place(schedule, first_cut + lax.div(boundary, steps)),
        jnp.int32(0),
        jnp.clip(end - boundary, 0, steps),
        jnp.int32(1),
        lax.div(boundary + (schedule.k_steps - 1), jnp.int32(share)) - worker,
    )
    middle = Segment(
        *_place(schedule, (index - 1) * schedule.workers + worker), jnp.int32(0), steps, jnp.int32(1), jnp.int32(0)
    )
    return Segment(
        *(
            jnp.where(opens, a, jnp.where(closes, b, c))
            for a, b, c in zip(first, last, middle, strict=True)
        )
    )


def _place(schedule: Schedule, tile: Any) -> tuple[Any, Any]:
    """(row, column) of a tile: groups of rows, column by column."""
    per_group = schedule.group * schedule.columns
    group = lax.div(tile, jnp.int32(per_group))
    inside = tile - group * per_group
    rows = jnp.clip(schedule.rows - group * schedule.group, 1, schedule.group)
    return group * schedule.group + lax.rem(inside, rows), lax.div(inside, rows)
