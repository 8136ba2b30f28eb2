"""How a persistent product is cut into tiles; no kernel is imported here."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.backends import TILE_ROWS, Target

MOST_WARPGROUPS = 2  # that multiply
COLUMNS = 128  # of each of the two blocks of a tile
K_STEP = 64  # rows of the weights that are multiplied at once


@dataclasses.dataclass(frozen=True)
class ProductConfig:
    """Tuning of the kernel.

    Attributes:
      sms: streaming multiprocessors of the device; cluster: how many of them share what they copy, 1 or 2.
      beside: the tiles of a cluster lie beside each other and share x; else below each other, and share weights.
      warpgroups: that multiply, 64 rows of a tile each.
      stages: of the ring.
      group: how many rows of clusters' tiles are walked together, column by column: their x stays in the L2 cache.
    """

    sms: int
    cluster: int = 2
    beside: bool = False
    warpgroups: int = MOST_WARPGROUPS
    stages: int = 4
    group: int = 4

    @property
    def rows(self) -> int:
        """Of a tile."""
        return self.warpgroups * TILE_ROWS


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tiles of clusters: rows, columns; group: rows walked together; workers: clusters that take tiles in turn."""

    rows: int
    columns: int
    group: int
    workers: int

    @property
    def rounds(self) -> int:
        """Tiles of the worker that has most."""
        return math.ceil(self.rows * self.columns / self.workers)

    @property
    def busy(self) -> float:
        """Share of the workers that have a tile, on average over the rounds."""
        return self.rows * self.columns / (self.rounds * self.workers)

    def place(self, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(row, column) of tile number `tile`, an int32 scalar."""
        per_group = self.group * self.columns
        group = lax.div(tile, jnp.int32(per_group))
        inside = tile - group * per_group
        height = jnp.minimum(self.rows - group * self.group, self.group)  # the last group may have fewer rows
        return group * self.group + lax.rem(inside, height), lax.div(inside, height)


def config_for(tokens: int, target: Target) -> ProductConfig:
    """One row of tiles where it holds all tokens, as low as they allow; the SMs of a cluster share x then."""
    warpgroups = min(math.ceil(tokens / TILE_ROWS), MOST_WARPGROUPS)
    return ProductConfig(target.sms, beside=tokens <= warpgroups * TILE_ROWS, warpgroups=warpgroups)


def tiling_of(tokens: int, blocks: int, config: ProductConfig) -> Tiling:
    """blocks: pairs of blocks of COLUMNS, the columns of all tiles beside each other."""
    below, beside = (1, config.cluster) if config.beside else (config.cluster, 1)
    rows, columns = math.ceil(tokens / (config.rows * below)), math.ceil(blocks / beside)
    return Tiling(rows, columns, min(config.group, rows), config.sms // config.cluster)
