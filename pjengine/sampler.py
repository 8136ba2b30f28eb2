"""Choosing tokens on the device: penalties, biases, masks, temperature, top-k, top-p, min-p.

The random stream of a sequence is a pure function of (seed, position): its tokens do not depend on its neighbours, on
preemption or on how steps were cut. Per-slot state (token counts, the last tokens) stays on the device, so that the
next step can be dispatched before the host has read this one's tokens.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike

from pjengine.sampling_params import MAX_BAD_WORD_TOKENS
from pjengine.token_draw import (
    CANDIDATES,
    Cut,
    Rows,
    cut_candidates,
    cut_min_p,
    cut_top_k,
    cut_top_p,
    draw,
    keep_all,
    tighter,
    to_blocks,
    to_weights,
)

TAIL = MAX_BAD_WORD_TOKENS
PROMPT_BIT = 1 << 14  # set in `counts` for tokens of the prompt; the bits below count occurrences in the output


class Variant(enum.IntEnum):
    """How much a sampling executable can do. Each does what the ones before it do, and gives the same tokens."""

    GREEDY = 0  # argmax of the logits as they are
    PLAIN = 1  # penalties, biases, masks; temperature and min-p
    TOP_K = 2  # top-k up to CANDIDATES, with top-p or without
    TOP_P = 3  # top-p alone
    TOP_K_TOP_P = 4  # any top-k, with top-p or without


def variant_of(top_k: int, top_p: float) -> Variant:
    """The smallest that samples with these."""
    if top_k > CANDIDATES:
        return Variant.TOP_K_TOP_P
    if top_k > 0:
        return Variant.TOP_K
    return Variant.TOP_P if top_p < 1 else Variant.PLAIN


@struct.dataclass
class SamplerState:
    """Per-slot device tables. The last slot (index S) is scratch: rows that sample nothing write there."""

    tail: jax.Array  # int32 [S + 1, TAIL]: each slot's latest tokens, newest last; -1 where there is none
    counts: jax.Array  # int16 [S + 1, vocab]: occurrences of each token, see PROMPT_BIT


@struct.dataclass
class SamplingInputs:
    """What the rows of a step ask for. R rows; K adjusted tokens and W forbidden words at most per row."""

    slots: jax.Array  # int32 [R]
    positions: jax.Array  # int32 [R]: place of the new token in its sequence
    seeds: jax.Array  # uint32 [R, 2]
    temperature: jax.Array  # float32 [R]; 0 is greedy
    top_p: jax.Array  # float32 [R]
    top_k: jax.Array  # int32 [R]; the vocabulary size keeps all
    min_p: jax.Array  # float32 [R]
    presence: jax.Array  # float32 [R]
    frequency: jax.Array  # float32 [R]
    repetition: jax.Array  # float32 [R]
    allow_only: jax.Array  # int32 [R]: 1: only tokens listed in bias_ids may be chosen
    bias_ids: jax.Array  # int32 [R, K]; -1: unused
    bias: jax.Array  # float32 [R, K], added; -inf forbids
    bad_words: jax.Array  # int32 [R, W, TAIL]: right-aligned token ids, -1 before them


def init_state(slots: int, vocab_size: int) -> SamplerState:
    return SamplerState(
        tail=jnp.full((slots + 1, TAIL), -1, jnp.int32), counts=jnp.zeros((slots + 1, vocab_size), jnp.int16)
    )


def set_slot(
    state: SamplerState, slot: ArrayLike, tokens: jax.Array, length: ArrayLike, prompt_len: ArrayLike
) -> SamplerState:
    """Loads a sequence's known tokens into a slot. tokens int32 [padded]; the first `length` count."""
    index = jnp.arange(tokens.shape[0])
    valid = index < length
    vocab = state.counts.shape[1]
    where = jnp.where(valid, tokens, vocab)
    in_prompt = jnp.zeros(vocab, jnp.int16).at[jnp.where(index < prompt_len, where, vocab)].set(PROMPT_BIT, mode="drop")
    in_output = jnp.zeros(vocab, jnp.int16).at[jnp.where(index >= prompt_len, where, vocab)].add(1, mode="drop")
    last = length - TAIL + jnp.arange(TAIL)
    tail = jnp.where(last >= 0, tokens[jnp.maximum(last, 0)], -1)
    return SamplerState(tail=state.tail.at[slot].set(tail), counts=state.counts.at[slot].set(in_prompt + in_output))


def sample(
    logits: jax.Array, state: SamplerState, inputs: SamplingInputs, variant: Variant, penalties: bool
) -> tuple[jax.Array, SamplerState]:
    """One token per row, int32 [R].

    Args:
      logits: float32 [R, vocab].
      variant: GREEDY ignores every parameter; the caller picks a variant that covers all rows.
      penalties: whether rows may have some; tokens are counted only if so.
    """
    if variant is Variant.GREEDY:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        tokens = choose(adjust(logits, state, inputs, penalties), inputs, variant)
    tail = state.tail[inputs.slots]
    tail = state.tail.at[inputs.slots].set(jnp.concatenate([tail[:, 1:], tokens[:, None]], axis=1))
    counts = state.counts
    if penalties:
        count = counts[inputs.slots, tokens]
        full = count % PROMPT_BIT == PROMPT_BIT - 1
        counts = counts.at[inputs.slots, tokens].set(jnp.where(full, count, count + 1))
    return tokens, SamplerState(tail, counts)


def adjust(logits: jax.Array, state: SamplerState, inputs: SamplingInputs, penalties: bool) -> Rows:
    """Biases, allowed tokens, forbidden words, then penalties. float32."""
    logits = _adjust_listed(logits, state, inputs)
    if not penalties:
        return Rows.of(logits)
    vocab = logits.shape[1]
    penalised = (inputs.presence != 0) | (inputs.frequency != 0) | (inputs.repetition != 1)
    # Rows without penalties all read the last slot's counts, which stay in the device's cache.
    slots = jnp.where(penalised, inputs.slots, state.counts.shape[0] - 1)

    def at(ids: jax.Array) -> jax.Array:
        known = jnp.minimum(ids, vocab - 1)
        values = penalise(jnp.take_along_axis(logits, known, axis=1), state.counts[slots[:, None], known], inputs)
        return jnp.where(ids < vocab, values, -jnp.inf)

    return Rows(to_blocks(penalise(logits, state.counts[slots], inputs)), at)


def penalise(logits: jax.Array, counts: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """The repetition penalty of CTRL (arXiv 1909.05858), then OpenAI's frequency and presence penalties.

    Args:
      logits: float32 [R, n].
      counts: int16 [R, n], see PROMPT_BIT.
    """
    repetition = inputs.repetition[:, None]
    factor = jnp.where(logits > 0, 1 / repetition, repetition)
    out = (counts & (PROMPT_BIT - 1)).astype(jnp.float32)
    subtracted = inputs.frequency[:, None] * out + jnp.where(out > 0, inputs.presence[:, None], 0.0)
    return jnp.where(counts > 0, logits * factor, logits) - subtracted


def choose(logits: Rows, inputs: SamplingInputs, variant: Variant) -> jax.Array:
    """One token per row from the softmax of logits / temperature, cut by top-k, then top-p, then min-p. int32 [R]."""
    # The barrier keeps XLA from making the maximum of the maxima another pass over the logits.
    maxima = jax.lax.optimization_barrier(jnp.max(logits.blocks, axis=2))
    top = jnp.max(maxima, axis=1)
    ids, values = logits.block_at(jnp.argmax(maxima, axis=1))
    likeliest = jnp.take_along_axis(ids, jnp.argmax(values, axis=1)[:, None], axis=1)[:, 0]
    drawn = jnp.isfinite(top) & (inputs.temperature > 0)
    top, temperature = jnp.where(drawn, top, 0.0), jnp.where(drawn, inputs.temperature, 1.0)
    weights = logits.map(lambda x: to_weights(x, top, temperature))
    cut = tighter(cut_min_p(inputs.min_p), _cut(weights, to_weights(maxima, top, temperature), inputs, variant))
    tokens = draw(weights, cut, _random(inputs.seeds, inputs.positions))
    return jnp.where(drawn, tokens, likeliest).astype(jnp.int32)


def _cut(weights: Rows, heaviest: jax.Array, inputs: SamplingInputs, variant: Variant) -> Cut:
    every = keep_all(heaviest.shape[0])
    if variant is Variant.PLAIN:
        return every
    if variant is Variant.TOP_K_TOP_P:
        cut = cut_top_k(weights, inputs.top_k)
        return tighter(cut, cut_top_p(weights, inputs.top_p, cut))
    cut = cut_candidates(heaviest, weights, inputs.top_k, inputs.top_p)
    if variant is Variant.TOP_P:
        cut = tighter(cut, cut_top_p(weights, jnp.where(inputs.top_k > 0, 1.0, inputs.top_p), every))
    return cut


def _adjust_listed(logits: jax.Array, state: SamplerState, inputs: SamplingInputs) -> jax.Array:
    rows = jnp.arange(logits.shape[0])[:, None]
    vocab = logits.shape[1]
    if inputs.bias_ids.shape[1]:
        ids = jnp.where(inputs.bias_ids < 0, vocab, inputs.bias_ids)
        base = jnp.where(inputs.allow_only[:, None] == 1, -jnp.inf, logits)
        kept = jnp.take_along_axis(logits, jnp.minimum(ids, vocab - 1), axis=1)
        base = base.at[rows, ids].set(kept, mode="drop")
        logits = base.at[rows, ids].add(inputs.bias, mode="drop")
    if inputs.bad_words.shape[1]:
        words = inputs.bad_words
        before = state.tail[inputs.slots][:, None, 1:]  # the new token will be the last of TAIL
        completes = jnp.all((words[:, :, :-1] < 0) | (words[:, :, :-1] == before), axis=-1)
        last = words[:, :, -1]
        logits = logits.at[rows, jnp.where(completes & (last >= 0), last, vocab)].set(-jnp.inf, mode="drop")
    return logits


def _random(seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """uint32 [R]: threefry of (seed, position)."""

    def one(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(jax.random.wrap_key_data(seed), position))

    return jax.vmap(one)(seeds, positions)
