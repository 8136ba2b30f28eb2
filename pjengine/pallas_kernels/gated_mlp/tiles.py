"""Where `gated_product` pays; no kernel is imported here."""

from __future__ import annotations

import math

from pjengine.pallas_kernels.backends import Target
from pjengine.pallas_kernels.persistent_product.tiles import COLUMNS, config_for, tiling_of

# From so many tokens on all tilings pay, of fewer those that leave few SMs idle. Elsewhere cuBLAS is level, or, for up
# to 32 tokens, XLA's Triton products are faster (docs/decisions.md).
_MANY_TOKENS = 1024
_FEWER_TOKENS = (range(33, 129), range(193, 257))
_BUSY = 0.8  # share of the SMs that must have a tile then, on average over the rounds


def pays(tokens: int, mlp: int, target: Target) -> bool:
    """Whether the kernel is faster than a product and its activation."""
    return tokens >= _MANY_TOKENS or any(tokens in some for some in _fewer_tokens(mlp, target))


def describe_tokens(mlp: int, target: Target) -> str:
    """For how many tokens it is faster, in words."""
    fewer = [f"{some[0]} to {some[-1]}" for some in _fewer_tokens(mlp, target)]
    return f"{', '.join([*fewer, f'from {_MANY_TOKENS}'])} tokens"


def _fewer_tokens(mlp: int, target: Target) -> list[range]:
    def busy(tokens: int) -> float:
        return tiling_of(tokens, math.ceil(mlp / COLUMNS), config_for(tokens, target)).busy

    return [some for some in _FEWER_TOKENS if busy(some[-1]) >= _BUSY]
