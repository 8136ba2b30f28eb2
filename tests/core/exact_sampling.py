"""Sampling as it is meant: by sorting, in exact arithmetic. Takes integer weights and the sampler's random numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.sampler import TAIL, SamplingInputs

HEAVIEST = 2**24 - 1


def inputs(rows: int, biases: int = 0, words: int = 0, **fields: object) -> SamplingInputs:
    base: dict[str, object] = {
        "slots": np.arange(rows),
        "positions": np.full(rows, 5),
        "seeds": np.stack([np.arange(rows), np.full(rows, 7)], 1).astype(np.uint32),
        "temperature": np.ones(rows, np.float32),
        "top_p": np.ones(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "min_p": np.zeros(rows, np.float32),
        "presence": np.zeros(rows, np.float32),
        "frequency": np.zeros(rows, np.float32),
        "repetition": np.ones(rows, np.float32),
        "allow_only": np.zeros(rows, np.int32),
        "bias_ids": np.full((rows, biases), -1, np.int32),
        "bias": np.zeros((rows, biases), np.float32),
        "bad_words": np.full((rows, words, TAIL), -1, np.int32),
    }
    return SamplingInputs(**{name: jnp.asarray(value) for name, value in (base | fields).items()})


def kept(weights: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Ids that stay after top-k, then top-p of what is left, then min-p; exact for integer weights, by sorting."""
    ids = np.lexsort((np.arange(len(weights)), -weights))
    ids = ids[weights[ids] > 0]
    if top_k > 0:
        ids = ids[:top_k]
    if top_p < 1:
        sums = np.cumsum(weights[ids])
        ids = ids[: np.searchsorted(sums, math.ceil(Fraction(top_p) * int(sums[-1]))) + 1]
    return np.sort(ids[weights[ids] >= math.ceil(np.float32(min_p) * np.float32(HEAVIEST))])


def drawn(weights: np.ndarray, kept: np.ndarray, seed: np.ndarray, position: int) -> int:
    """The token at a random place of the cumulative distribution, in the order of the ids."""
    key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(seed)), position)
    sums = np.cumsum(weights[kept])
    return int(kept[np.searchsorted(sums, int(jax.random.bits(key)) * int(sums[-1]) >> 32, side="right")])
