"""The sampler on the GPU at the size of a real vocabulary, against sorting in exact arithmetic."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.logprobs import compute_logprobs
from pjengine.sampler import Variant, init_state, sample, variant_of
from pjengine.token_draw import to_weights
from tests.core.exact_sampling import drawn, inputs, kept

pytestmark = pytest.mark.gpu

ROWS, VOCAB = 32, 128_256


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    random = np.random.default_rng(0)
    values = random.normal(0, random.uniform(0.5, 4, (ROWS, 1)), (ROWS, VOCAB)).astype(np.float32)
    values[::4] = np.round(values[::4])
    values[1] = 0
    values[2, 1:] = -np.inf
    return values


@pytest.mark.parametrize("variant", list(Variant)[Variant.PLAIN :])
@pytest.mark.parametrize("penalties", [False, True])
def test_tokens_are_those_of_exact_arithmetic(logits: np.ndarray, variant: Variant, penalties: bool) -> None:
    random = np.random.default_rng(variant)
    asked = [(k, p) for k in (0, 1, 50, 64, 100, 200_000) for p in (1.0, 0.9, 1e-6) if variant_of(k, p) <= variant]
    chosen = [asked[i] for i in random.integers(0, len(asked), ROWS)]
    top_k, top_p = np.array([k for k, _ in chosen], np.int32), np.array([p for _, p in chosen], np.float32)
    seeds = random.integers(0, 2**32, (ROWS, 2), dtype=np.uint32)
    temperature = random.choice([0.5, 1.0, 2.0], ROWS).astype(np.float32)
    rows = inputs(ROWS, seeds=seeds, top_k=top_k, top_p=top_p, temperature=temperature)
    step = jax.jit(sample, static_argnums=(3, 4))
    tokens, _ = step(logits, init_state(ROWS, VOCAB), rows, variant, penalties)
    weights = np.asarray(jax.jit(to_weights)(logits, logits.max(1), temperature)).astype(np.int64)
    expected = [
        drawn(w, kept(w, int(k), float(p), 0.0), s, 5) for w, k, p, s in zip(weights, top_k, top_p, seeds, strict=True)
    ]
    assert np.asarray(tokens).tolist() == expected


def test_greedy_is_the_argmax(logits: np.ndarray) -> None:
    step = jax.jit(sample, static_argnums=(3, 4))
    tokens, _ = step(logits, init_state(ROWS, VOCAB), inputs(ROWS), Variant.GREEDY, False)
    assert np.asarray(tokens).tolist() == logits.argmax(1).tolist()


def test_logprobs(logits: np.ndarray) -> None:
    found = jax.jit(compute_logprobs)(logits, jnp.arange(ROWS))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(found.top_ids, order)
    exact = np.exp(logits.astype(np.float64))
    expected = logits - np.log(exact.sum(1, keepdims=True))
    np.testing.assert_allclose(found.top, np.take_along_axis(expected, order, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.rank, 1 + (logits > logits[np.arange(ROWS), np.arange(ROWS)][:, None]).sum(1))
