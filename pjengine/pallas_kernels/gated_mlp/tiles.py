"""How `gated_product` is cut into tiles, and where that pays; no kernel is imported here."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.backends import TILE_ROWS, Target

MOST_WARPGROUPS = 2  # that multiply
COLUMNS = 128  # of a tile, in gate and in up each

# From so many tokens on all tilings pay, of fewer those that leave few SMs idle. Elsewhere cuBLAS is level, or, for up
# to 32 tokens, XLA's Triton products are faster (docs/decisions.md).
_MANY_TOKENS = 1024
_FEWER_TOKENS = (range(33, 129), range(193, 257))
_BUSY = 0.8  # share of the SMs that must have a tile then, on average over the rounds


@dataclasses.dataclass(frozen=True)
class GatedConfig:
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


def config_for(tokens: int, target: Target) -> GatedConfig:
    """One row of tiles where it holds all tokens, as low as they allow; the SMs of a cluster share x then."""
    warpgroups = min(math.ceil(tokens / TILE_ROWS), MOST_WARPGROUPS)
    return GatedConfig(target.sms, beside=tokens <= warpgroups * TILE_ROWS, warpgroups=warpgroups)


def tiling_of(tokens: int, mlp: int, config: GatedConfig) -> Tiling:
    below, beside = (1, config.cluster) if config.beside else (config.cluster, 1)
    rows, columns = math.ceil(tokens / (config.rows * below)), math.ceil(mlp / (COLUMNS * beside))
    return Tiling(rows, columns, min(config.group, rows), config.sms // config.cluster)


def pays(tokens: int, mlp: int, target: Target) -> bool:
    """Whether the kernel is faster than a product and its activation."""
    return tokens >= _MANY_TOKENS or any(tokens in some for some in _fewer_tokens(mlp, target))


def describe_tokens(mlp: int, target: Target) -> str:
    """For how many tokens it is faster, in words."""
    fewer = [f"{some[0]} to {some[-1]}" for some in _fewer_tokens(mlp, target)]
    return f"{', '.join([*fewer, f'from {_MANY_TOKENS}'])} tokens"


def _fewer_tokens(mlp: int, target: Target) -> list[range]:
    def busy(tokens: int) -> float:
        return tiling_of(tokens, mlp, config_for(tokens, target)).busy

    return [some for some in _FEWER_TOKENS if busy(some[-1]) >= _BUSY]
