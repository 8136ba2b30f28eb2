"""How `qkv_product` is cut into tiles, and where that pays; no kernel is imported here."""

from __future__ import annotations

import math

from pjengine.pallas_kernels.backends import Target
from pjengine.pallas_kernels.persistent_product.tiles import COLUMNS, config_for, tiling_of

LEAST_TOKENS = 1024
# What is saved is a pass over the projection. It takes as long as the product of a hidden size of _PASS: 4 bytes an
# element at 4.1 TB/s beside 2 FLOP for each of its rows at 700 TFLOP/s.
_PASS = 340
_CUBLAS = 0.94  # how well cuBLAS, which has smaller tiles to choose from, is expected to use the SMs


def pays(tokens: int, hidden: int, width: int, target: Target) -> bool:
    """Whether the kernel is faster than a product and a rotation. width: columns of the projection."""
    config = config_for(tokens, target)
    tiling = tiling_of(tokens, math.ceil(width / (2 * COLUMNS)), config)
    whole = tiling.rounds * tiling.workers * config.cluster * config.rows * 2 * COLUMNS
    used = tokens * width / whole  # of the multiplications that the SMs could do in the tiles' rounds
    return tokens >= LEAST_TOKENS and used * (1 + _PASS / hidden) >= _CUBLAS
