"""Log-probabilities on the device against numpy."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pjengine.logprobs import compute_logprobs


@pytest.mark.parametrize("vocab", [12, 600, 1280])
def test_logprobs_are_those_of_a_log_softmax(vocab: int) -> None:
    logits = np.random.default_rng(4).normal(size=(3, vocab)).astype(np.float32)
    logits[2] = np.round(logits[2])  # equals: the lower id first
    tokens = np.array([5, int(logits[1].argmax()), 7])
    found = jax.jit(compute_logprobs)(logits, tokens)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.token, expected[np.arange(3), tokens], rtol=1e-5)
    assert found.rank[1] == 1
    assert found.rank[0] == 1 + (logits[0] > logits[0, 5]).sum()
    order = np.argsort(-logits, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(found.top, np.take_along_axis(expected, order, 1), rtol=1e-5)
