"""The device sampler against plain numpy, row by row."""

from __future__ import annotations

import functools
import math
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
    init_state,
    sample,
    set_slot,
    variant_of,
)
from tests.core.exact_sampling import HEAVIEST, drawn, inputs, kept

VOCAB = 600  # not a multiple of the sampler's blocks
SLOTS = 4
ROWS = 32


@functools.cache
def compiled_adjust() -> Any:
    def both(logits: jax.Array, state: SamplerState, asked: SamplingInputs) -> tuple[jax.Array, jax.Array]:
        rows = adjust(logits, state, asked, penalties=True)
        whole = rows.blocks.reshape(len(logits), -1)
        return whole, rows.at(jnp.broadcast_to(jnp.arange(whole.shape[1]), whole.shape))

    return jax.jit(both)


@functools.cache
def compiled(variant: Variant, penalties: bool = False) -> Any:
    return jax.jit(functools.partial(sample, variant=variant, penalties=penalties))


def tokens_of(logits: np.ndarray, asked: SamplingInputs, variant: Variant, penalties: bool = False) -> np.ndarray:
    """Pads to ROWS rows, so that few shapes are compiled."""
    rows = len(logits)
    repeat = jnp.asarray(np.resize(np.arange(rows), max(rows, ROWS)))
    asked = jax.tree.map(lambda x: x[repeat], asked)
    tokens, _ = compiled(variant, penalties)(
        logits[np.asarray(repeat)], init_state(len(repeat), logits.shape[1]), asked
    )
    return np.asarray(tokens)[:rows]


def draws(logits: np.ndarray, count: int, variant: Variant, **fields: float) -> np.ndarray:
    """Tokens of `count` independent rows that share their logits."""
    seeds = np.stack([np.arange(count), np.full(count, 3)], 1).astype(np.uint32)
    rows: dict[str, Any] = {
        name: np.full(count, value, np.float32 if name != "top_k" else np.int32) for name, value in fields.items()
    }
    return tokens_of(np.tile(logits, (count, 1)), inputs(count, seeds=seeds, **rows), variant)


def weights_by_numpy(logits: np.ndarray, temperature: np.ndarray) -> np.ndarray:
    scaled = (logits - logits.max(1, keepdims=True)) * (np.float32(1) / temperature)[:, None]
    return np.round(np.asarray(jax.jit(jnp.exp)(scaled)) * np.float32(HEAVIEST)).astype(np.int64)


def wild_logits(random: np.random.Generator) -> np.ndarray:
    """Rows of many kinds: smooth, full of ties, flat, one token alone, few tokens, huge."""
    logits = random.normal(0, random.uniform(0.1, 5, (ROWS, 1)), (ROWS, VOCAB)).astype(np.float32)
    logits[::4] = np.round(logits[::4])
    logits[1] = 0
    logits[2:4] = -np.inf
    logits[2, random.integers(VOCAB)] = -7
    logits[3, random.integers(0, VOCAB, 5)] = random.normal(0, 1, 5)
    logits[5] *= 1e30
    logits[6, random.integers(0, VOCAB, 100)] = -np.inf
    return logits


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_variant_draws_the_token_that_sorting_in_exact_arithmetic_draws(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = wild_logits(random)
    top_k = random.choice([0, 0, 1, 2, 50, 64, 65, 599, 600, 10_000], ROWS).astype(np.int32)
    top_p = random.choice([1, 0.999, 0.9, 0.5, 1e-3, 1e-12], ROWS).astype(np.float32)
    min_p = random.choice([0, 0, 0.05, 0.5, 1], ROWS).astype(np.float32)
    temperature = random.choice([1e-5, 0.2, 1, 3, 1000], ROWS).astype(np.float32)
    seeds = random.integers(0, 2**32, (ROWS, 2), dtype=np.uint32)
    asked = inputs(ROWS, seeds=seeds, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    with np.errstate(invalid="ignore"):
        weights = weights_by_numpy(logits, temperature)
    expected = [
        drawn(w, kept(w, int(k), float(p), float(m)), s, 5)
        for w, k, p, m, s in zip(weights, top_k, top_p, min_p, seeds, strict=True)
    ]
    needed = np.array([variant_of(int(k), float(p)) for k, p in zip(top_k, top_p, strict=True)])
    for variant in list(Variant)[Variant.PLAIN :]:
        covered = needed <= variant
        found = tokens_of(logits, asked, variant)
        assert found[covered].tolist() == np.array(expected)[covered].tolist(), variant.name
    with_penalties = tokens_of(logits, asked, Variant.TOP_K_TOP_P, penalties=True)  # which are none in every row
    assert with_penalties.tolist() == expected


def test_weights_are_the_softmax() -> None:
    """What the test above takes for granted: integer weights are probabilities to 24 bits of the likeliest one's."""
    logits = np.random.default_rng(0).normal(0, 4, VOCAB).astype(np.float32)
    for temperature in (0.3, 1.0, 2.5):
        weights = weights_by_numpy(logits[None], np.array([temperature], np.float32))[0]
        exact = np.exp((logits.astype(np.float64) - logits.max()) / np.float32(temperature))
        np.testing.assert_allclose(weights / HEAVIEST, exact, rtol=5e-6, atol=2**-24)


@pytest.mark.parametrize("variant", [Variant.TOP_K, Variant.TOP_P, Variant.TOP_K_TOP_P])
def test_equals_are_kept_in_the_order_of_their_ids(variant: Variant) -> None:
    logits = np.zeros(VOCAB, np.float32)
    assert set(draws(logits, ROWS, variant, top_k=5)) == set(range(5))
    logits[300] = 1
    assert set(draws(logits, ROWS, variant, top_k=3)) == {0, 1, 300}
    if variant > Variant.TOP_K:
        assert set(draws(np.zeros(VOCAB, np.float32), ROWS, variant, top_p=0.0051)) == set(range(4))  # 3.06 of 600


def test_frequencies_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32))
    counts = np.bincount(draws(logits, 20_000, Variant.PLAIN), minlength=5)
    expected = 20_000 * np.exp(logits)
    assert np.sum((counts - expected) ** 2 / expected) < 18.5  # chi-squared, 4 degrees of freedom, p = 0.001


def test_unlikely_tokens_have_their_share() -> None:
    """A million tokens a thousand times: 256 tokens of 2^-20 each beside one of all the rest."""
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[0], logits[100:356] = 0, np.log(2.0**-14)
    found = draws(logits, 30_000, Variant.PLAIN)
    share = 256 * 2.0**-14 / (1 + 256 * 2.0**-14)
    unlikely = found[found > 0]
    assert abs(len(unlikely) - 30_000 * share) < 4 * math.sqrt(30_000 * share)
    assert len(np.unique(unlikely)) > 150  # of 256; 460 draws miss 42 on average


def test_a_row_depends_on_its_seed_and_position_only() -> None:
    logits = np.random.default_rng(0).normal(size=(4, VOCAB)).astype(np.float32)
    asked = inputs(4, top_k=np.array([0, 3, 0, 100]), top_p=np.array([1, 0.9, 0.5, 0.99], np.float32))
    together = tokens_of(logits, asked, Variant.TOP_K_TOP_P)
    for row in range(4):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], asked)
        alone, _ = compiled(Variant.TOP_K_TOP_P)(logits[row : row + 1], init_state(SLOTS, VOCAB), one)
        assert alone[0] == together[row]
    later = tokens_of(logits, inputs(4, positions=np.full(4, 6)), Variant.PLAIN)
    assert not np.array_equal(later, tokens_of(logits, inputs(4), Variant.PLAIN))


@pytest.mark.parametrize("variant", list(Variant)[Variant.PLAIN :])
def test_temperature_zero_is_the_argmax_beside_sampling_neighbours(variant: Variant) -> None:
    logits = np.random.default_rng(1).normal(size=(3, VOCAB)).astype(np.float32)
    logits[2] = np.round(logits[2])
    tokens = tokens_of(logits, inputs(3, temperature=np.array([0, 1, 0], np.float32)), variant)
    assert tokens[[0, 2]].tolist() == logits[[0, 2]].argmax(1).tolist()
    assert tokens_of(logits, inputs(3), Variant.GREEDY).tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("variant", list(Variant)[Variant.PLAIN :])
def test_a_row_with_nothing_allowed_leaves_its_neighbours_alone(variant: Variant) -> None:
    logits = np.random.default_rng(1).normal(size=(2, VOCAB)).astype(np.float32)
    before = tokens_of(logits, inputs(2), variant)
    logits[0] = -np.inf
    after = tokens_of(logits, inputs(2), variant)
    assert after[1] == before[1]
    assert 0 <= after[0] < VOCAB


def adjusted(logits: np.ndarray, state: SamplerState, asked: SamplingInputs) -> np.ndarray:
    """All of the adjusted logits, which must not depend on how they are read."""
    whole, at = map(np.asarray, compiled_adjust()(logits, state, asked))
    np.testing.assert_array_equal(at, whole)
    assert np.isneginf(whole[:, VOCAB:]).all()
    return whole[:, :VOCAB]


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
    np.testing.assert_allclose(adjusted(logits, state, asked)[0], expected, rtol=1e-5, atol=1e-6)


def test_sampled_tokens_are_counted_and_remembered() -> None:
    state = set_slot(init_state(SLOTS, VOCAB), 1, jnp.array([9, 8, 7, 0]), 3, 2)
    logits = jnp.full((1, VOCAB), -5.0).at[0, 42].set(5.0)
    asked = inputs(1, slots=np.array([1]), temperature=np.zeros(1, np.float32))
    for _ in range(2):
        _, state = compiled(Variant.PLAIN, penalties=True)(logits, state, asked)
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
    found = adjusted(logits, init_state(SLOTS, VOCAB), asked)
    expected = logits.copy()
    expected[0, 10] += 100
    expected[0, 11] = -np.inf
    expected[1] = -np.inf
    expected[1, [20, 21]] = logits[1, [20, 21]] + [0, 1]
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(
    ("tail", "word", "forbidden"),
    [([1, 2], [3], True), ([1, 2], [2, 3], True), ([1, 2], [1, 2, 3], True), ([1, 2], [1, 3], False)],
)
def test_a_forbidden_word_is_stopped_at_its_last_token(tail: list[int], word: list[int], forbidden: bool) -> None:
    state = set_slot(init_state(SLOTS, VOCAB), 0, jnp.array(tail), len(tail), 0)
    words = np.full((1, 16, TAIL), -1, np.int32)
    words[0, 0, TAIL - len(word) :] = word
    found = adjusted(np.zeros((1, VOCAB), np.float32), state, inputs(1, words=16, bad_words=words))
    assert np.isneginf(found[0, 3]) == forbidden
    assert np.isneginf(found).sum() == forbidden


def test_a_slot_forgets_its_last_tenant() -> None:
    state = SamplerState(tail=jnp.full((SLOTS + 1, TAIL), 5), counts=jnp.full((SLOTS + 1, VOCAB), 3, jnp.int16))
    state = set_slot(state, 2, jnp.array([1, 0, 0, 0]), 1, 1)
    assert state.tail[2].tolist() == [-1] * (TAIL - 1) + [1]
    assert state.counts[2].sum() == PROMPT_BIT
    assert state.counts[1, 0] == 3
