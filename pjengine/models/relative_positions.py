"""Buckets of relative positions: near keys each have their own, farther ones share (T5, arXiv:1910.10683)."""

from __future__ import annotations

import math

import numpy as np

DISTANCE = 128  # keys farther away all fall into their side's last bucket


def relative_buckets(buckets: int) -> np.ndarray:
    """Bucket of the key at `d - DISTANCE` positions after the query, int32 [2 * DISTANCE + 1] by d."""
    offsets = np.arange(-DISTANCE, DISTANCE + 1)
    half = buckets // 2
    exact = half // 2  # so many distances have a bucket each, the others share them by their logarithm
    far = np.abs(offsets)
    # float32 throughout: the model was trained with its rounding.
    turns = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(DISTANCE / exact))
    shared = np.minimum(exact + (turns * np.float32(half - exact)).astype(np.int32), half - 1)
    return (np.where(far < exact, far, shared) + np.where(offsets > 0, half, 0)).astype(np.int32)
