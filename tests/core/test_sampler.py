"""The device sampler against plain numpy, row by row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjengine.sampler import (
    PROMPT_BIT,
    TAIL,
    SamplerState,
    SamplingInputs,
    Variant,
    adjust,
    compute_logprobs,
    init_state,
    sample,
    set_slot,
)

VOCAB = 600
SLOTS = 4


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


def draws(logits: np.ndarray, count: int, **fields: object) -> np.ndarray:
    """Tokens of `count` independent rows that share their logits."""
    seeds = np.stack([np.arange(count), np.full(count, 3)], 1).astype(np.uint32)
    rows: dict[str, Any] = {
        name: np.full(count, value, np.float32 if name != "top_k" else np.int32) for name, value in fields.items()
    }
    asked = inputs(count, seeds=seeds, slots=np.zeros(count, np.int32), **rows)
    sampled, _ = jax.jit(sample, static_argnums=3)(
        jnp.tile(logits, (count, 1)), init_state(1, logits.shape[0]), asked, Variant.SAMPLE
    )
    return np.asarray(sampled.tokens)


def kept_by_numpy(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Probabilities after top-k, then top-p, then min-p, by sorting."""
    p = np.exp((logits - logits.max()) / temperature).astype(np.float64)
    order = np.argsort(-p, kind="stable")
    if top_k > 0:
        p[order[top_k:]] = 0
    p /= p.sum()
    if top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.floats(0.2, 3),
    top_k=st.sampled_from([0, 1, 2, 10, 599, 600, 10_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_only_tokens_that_survive_the_cuts_are_drawn(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)
    allowed = kept_by_numpy(logits, temperature, top_k, top_p, min_p)
    tokens = draws(logits, 64, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    cut = allowed[tokens] == 0
    # float32 sums may put the boundary token of top-p on the other side
    nearest = np.sort(allowed[allowed > 0])[0]
    probabilities = np.exp(logits / temperature)
    assert np.all(probabilities[tokens[cut]] <= probabilities[allowed == nearest].min() * 1.0001)
    assert cut.mean() < 0.05


def test_frequencies_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32))
    counts = np.bincount(draws(logits, 20_000), minlength=5)
    expected = 20_000 * np.exp(logits)
    assert np.sum((counts - expected) ** 2 / expected) < 18.5  # chi-squared, 4 degrees of freedom, p = 0.001


def test_a_row_depends_on_its_seed_and_position_only() -> None:
    logits = np.random.default_rng(0).normal(size=(4, VOCAB)).astype(np.float32)
    run = jax.jit(sample, static_argnums=3)
    together, _ = run(jnp.asarray(logits), init_state(SLOTS, VOCAB), inputs(4), Variant.SAMPLE)
    for row in range(4):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], inputs(4))
        alone, _ = run(jnp.asarray(logits[row : row + 1]), init_state(SLOTS, VOCAB), one, Variant.SAMPLE)
        assert alone.tokens[0] == together.tokens[row]
    later, _ = run(jnp.asarray(logits), init_state(SLOTS, VOCAB), inputs(4, positions=np.full(4, 6)), Variant.SAMPLE)
    assert not np.array_equal(later.tokens, together.tokens)


def test_temperature_zero_is_the_argmax_beside_sampling_neighbours() -> None:
    logits = np.random.default_rng(1).normal(size=(3, VOCAB)).astype(np.float32)
    asked = inputs(3, temperature=np.array([0, 1, 0], np.float32))
    tokens = sample(jnp.asarray(logits), init_state(SLOTS, VOCAB), asked, Variant.SAMPLE)[0].tokens
    assert tokens[0] == logits[0].argmax()
    assert tokens[2] == logits[2].argmax()


def test_penalties_are_those_of_the_openai_and_ctrl_formulas() -> None:
    prompt, output = [3, 4, 4], [5, 5, 6]
    state = set_slot(init_state(SLOTS, VOCAB), 0, jnp.array([*prompt, *output, 0, 0]), 6, 3)
    logits = np.random.default_rng(2).normal(size=(1, VOCAB)).astype(np.float32)
    asked = inputs(
        1,
        presence=np.array([0.5], np.float32),
        frequency=np.array([0.25], np.float32),
        repetition=np.array([1.3], np.float32),
    )
    expected = logits[0].copy()
    for token in {*prompt, *output}:
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token in set(output):
        expected[token] -= 0.5 + 0.25 * output.count(token)
    np.testing.assert_allclose(adjust(jnp.asarray(logits), state, asked)[0], expected, rtol=1e-5, atol=1e-6)


def test_sampled_tokens_are_counted_and_remembered() -> None:
    state = set_slot(init_state(SLOTS, VOCAB), 1, jnp.array([9, 8, 7, 0]), 3, 2)
    logits = jnp.full((1, VOCAB), -5.0).at[0, 42].set(5.0)
    asked = inputs(1, slots=np.array([1]), temperature=np.zeros(1, np.float32))
    for _ in range(2):
        _, state = sample(logits, state, asked, Variant.SAMPLE)
    assert state.counts[1, 42] == 2
    assert state.counts[1, 9] == PROMPT_BIT
    assert state.counts[1, 7] == 1
    assert state.tail[1, -5:].tolist() == [9, 8, 7, 42, 42]


def test_biases_and_allowed_tokens() -> None:
    logits = np.random.default_rng(3).normal(size=(2, VOCAB)).astype(np.float32)
    ids = np.full((2, 64), -1, np.int32)
    bias = np.zeros((2, 64), np.float32)
    ids[0, :2], bias[0, :2] = [10, 11], [100, -np.inf]
    ids[1, :2], bias[1, :2] = [20, 21], [0, 1]
    asked = inputs(2, biases=64, allow_only=np.array([0, 1]), bias_ids=ids, bias=bias)
    adjusted = np.asarray(adjust(jnp.asarray(logits), init_state(SLOTS, VOCAB), asked))
    expected = logits.copy()
    expected[0, 10] += 100
    expected[0, 11] = -np.inf
    expected[1] = -np.inf
    expected[1, [20, 21]] = logits[1, [20, 21]] + [0, 1]
    np.testing.assert_allclose(adjusted, expected)


@pytest.mark.parametrize(
    ("tail", "word", "forbidden"),
    [([1, 2], [3], True), ([1, 2], [2, 3], True), ([1, 2], [1, 2, 3], True), ([1, 2], [1, 3], False)],
)
def test_a_forbidden_word_is_stopped_at_its_last_token(tail: list[int], word: list[int], forbidden: bool) -> None:
    state = set_slot(init_state(SLOTS, VOCAB), 0, jnp.array(tail), len(tail), 0)
    words = np.full((1, 16, TAIL), -1, np.int32)
    words[0, 0, TAIL - len(word) :] = word
    adjusted = adjust(jnp.zeros((1, VOCAB)), state, inputs(1, words=16, bad_words=words))
    assert np.isneginf(adjusted[0, 3]) == forbidden
    assert np.isneginf(adjusted).sum() == forbidden


def test_logprobs_are_those_of_a_log_softmax() -> None:
    logits = np.random.default_rng(4).normal(size=(3, VOCAB)).astype(np.float32)
    tokens = np.array([5, int(logits[1].argmax()), 17])
    found = compute_logprobs(jnp.asarray(logits), jnp.asarray(tokens))
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.token, expected[np.arange(3), tokens], rtol=1e-5)
    assert found.rank[1] == 1
    assert found.rank[0] == 1 + (logits[0] > logits[0, 5]).sum()
    np.testing.assert_allclose(found.top, -np.sort(-expected)[:, :20], rtol=1e-5)


def test_a_slot_forgets_its_last_tenant() -> None:
    state = SamplerState(tail=jnp.full((SLOTS + 1, TAIL), 5), counts=jnp.full((SLOTS + 1, VOCAB), 3, jnp.int16))
    state = set_slot(state, 2, jnp.array([1, 0, 0, 0]), 1, 1)
    assert state.tail[2].tolist() == [-1] * (TAIL - 1) + [1]
    assert state.counts[2].sum() == PROMPT_BIT
    assert state.counts[1, 0] == 3
