"""Pooling of packed rows, against numpy and, where it has a library's peculiarities, against its formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models.pooling import POOLINGS, pool, unit_length
from pjengine.step_inputs import StepInputs, packed_inputs
from tests.helpers import load_golden

EXPECTED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda row: row.mean(0),
    "cls": lambda row: row[0],
    "last": lambda row: row[-1],
    "max": lambda row: row.max(0),
    "weightedmean": lambda row: np.average(row, axis=0, weights=np.arange(1, len(row) + 1)),
    "mean_sqrt_len": lambda row: row.sum(0) / np.sqrt(len(row)),
}


@pytest.mark.parametrize("mode", POOLINGS)
def test_a_padded_step(mode: str) -> None:
    """Rows without tokens and tokens without a row change nothing and stay finite."""
    golden, _ = load_golden("bert")
    rows = [golden["hidden"][a:b] for a, b in itertools.pairwise(golden["starts"])]
    ends = [len(golden["hidden"])] * 3
    positions = np.concatenate([np.arange(len(row)) for row in rows])
    inputs = StepInputs(
        token_ids=jnp.zeros(160, jnp.int32),
        positions=jnp.asarray(np.pad(positions, (0, 160 - len(positions))), jnp.int32),
        query_starts=jnp.asarray([*golden["starts"], *ends], jnp.int32),
        kv_lens=jnp.asarray([*map(len, rows), 0, 0, 0], jnp.int32),
    )
    hidden = np.full((160, golden["hidden"].shape[1]), 1e6, np.float32)
    hidden[: ends[0]] = golden["hidden"]
    pooled = np.asarray(pool(jnp.asarray(hidden), inputs, mode))
    assert pooled.shape == (8, hidden.shape[1])
    assert np.isfinite(pooled).all()
    np.testing.assert_allclose(pooled[:5], np.stack([EXPECTED[mode](row) for row in rows]), rtol=1e-5, atol=1e-6)


def test_unit_length_of_zeros_is_zeros() -> None:
    vectors = np.asarray(unit_length(jnp.asarray([[3.0, 4.0], [0.0, 0.0]])))
    np.testing.assert_allclose(vectors, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match=r"mode: expected one of mean, cls, last, max, .*, got 'sum'"):
        pool(jnp.zeros((3, 4)), packed_inputs([[1, 2, 3]]), "sum")
