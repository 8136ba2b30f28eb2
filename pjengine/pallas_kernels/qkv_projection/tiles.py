"""How `qkv_product` is cut into tiles, and where that pays; no kernel is imported here."""

from __future__ import annotations

import math

from pjengine.pallas_kernels.backends import Target
from pjengine.pallas_kernels.persistent_product.tiles import COLUMNS, config_for, tiling_of

LEAST_TOKENS = 1024
# What is saved is a pass over the projection, a tenth to a third of the product's time: less than a round of tiles that
# leaves most SMs idle costs, where cuBLAS has smaller tiles to choose from.
_USED = 0.8  # share of the multiplications the SMs could do in the tiles' rounds


def pays(tokens: int, width: int, target: Target) -> bool:
    """Whether the kernel is faster than a product and a rotation. width: columns of the projection."""
    config = config_for(tokens, target)
    tiling = tiling_of(tokens, math.ceil(width / (2 * COLUMNS)), config)
    whole = tiling.rounds * tiling.workers * config.cluster * config.rows * 2 * COLUMNS
    return tokens >= LEAST_TOKENS and tokens * width >= _USED * whole
