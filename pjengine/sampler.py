"""Choosing tokens on the device: penalties, biases, masks, temperature, top-k, top-p, min-p, log-probabilities.

The random stream of a sequence is a pure function of (seed, position): its tokens do not depend on its neighbours, on
preemption or on how steps were cut. Per-slot state (token counts, the last tokens) stays on the device, so that the
next step can be dispatched before the host has read this one's tokens.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike

from pjengine.sampling_params import MAX_BAD_WORD_TOKENS, MAX_LOGPROBS

TAIL = MAX_BAD_WORD_TOKENS
PROMPT_BIT = 1 << 14  # set in `counts` for tokens of the prompt; the bits below count occurrences in the output
_CDF_BLOCK = 512


class Variant(enum.IntEnum):
    """How much a sampling executable can do; each includes what the ones before it do."""

    GREEDY = 0  # argmax
    SAMPLE = 1  # everything but log-probabilities
    LOGPROBS = 2


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


@struct.dataclass
class Sampled:
    tokens: jax.Array  # int32 [R]
    logprobs: Logprobs | None = None


@struct.dataclass
class Logprobs:
    """Of the model's own distribution, before any adjustment."""

    token: jax.Array  # float32 [N]
    rank: jax.Array  # int32 [N], 1 is the most likely
    top_ids: jax.Array  # int32 [N, MAX_LOGPROBS]
    top: jax.Array  # float32 [N, MAX_LOGPROBS]


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
    logits: jax.Array, state: SamplerState, inputs: SamplingInputs, variant: Variant
) -> tuple[Sampled, SamplerState]:
    """One token per row.

    Args:
      logits: float32 [R, vocab].
      variant: GREEDY ignores every parameter; the caller picks a variant that covers all rows.
    """
    greedy = _argmax(logits)
    if variant is Variant.GREEDY:
        tokens = greedy
    else:
        adjusted = adjust(logits, state, inputs)
        tokens = jnp.where(inputs.temperature == 0, _argmax(adjusted), draw(adjusted, inputs)).astype(jnp.int32)
    logprobs = compute_logprobs(logits, tokens) if variant is Variant.LOGPROBS else None
    tail = state.tail[inputs.slots]
    tail = state.tail.at[inputs.slots].set(jnp.concatenate([tail[:, 1:], tokens[:, None]], axis=1))
    counts = state.counts
    if variant is not Variant.GREEDY:
        count = counts[inputs.slots, tokens]
        full = count % PROMPT_BIT == PROMPT_BIT - 1
        counts = counts.at[inputs.slots, tokens].set(jnp.where(full, count, count + 1))
    return Sampled(tokens, logprobs), SamplerState(tail, counts)


def adjust(logits: jax.Array, state: SamplerState, inputs: SamplingInputs) -> jax.Array:
    """Biases, allowed tokens, forbidden words, then penalties. float32 [R, vocab]."""
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
    counts = state.counts[inputs.slots].astype(jnp.int32)
    out = (counts % PROMPT_BIT).astype(jnp.float32)
    repetition = jnp.where(counts > 0, inputs.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    return logits - inputs.frequency[:, None] * out - inputs.presence[:, None] * (out > 0)


def draw(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """One token per row from the softmax of logits / temperature, cut by top-k, then top-p, then min-p. int32 [R].

    Top-k and top-p thresholds come from a bisection over float bits, not from a sort (as in tpu-inference's
    `binary_search`); ties with the threshold are kept. The draw inverts the cumulative distribution at one uniform
    number.
    """
    scaled = logits / jnp.where(inputs.temperature == 0, 1.0, inputs.temperature)[:, None]
    scaled = scaled - jnp.max(scaled, axis=-1, keepdims=True)
    keys = _ordered_bits(scaled)
    k = jnp.where(inputs.top_k <= 0, logits.shape[1], inputs.top_k)
    top_k = _threshold(lambda t: jnp.sum(keys >= t[:, None], axis=-1) >= k, logits.shape[0])
    weights = jnp.where(keys >= top_k[:, None], jnp.exp(scaled), 0.0)
    mass = inputs.top_p * jnp.sum(weights, axis=-1)
    top_p = _threshold(lambda t: jnp.sum(jnp.where(keys >= t[:, None], weights, 0.0), axis=-1) >= mass, logits.shape[0])
    keep = (inputs.top_p >= 1.0)[:, None] | (keys >= top_p[:, None])
    # The most likely token weighs 1 after the shift, so min-p compares weights with itself.
    weights = jnp.where(keep & (weights >= inputs.min_p[:, None]), weights, 0.0)
    return _invert_cdf(weights, _uniform(inputs.seeds, inputs.positions))


def compute_logprobs(logits: jax.Array, tokens: jax.Array) -> Logprobs:
    """Log-probabilities of `tokens` int32 [N] and of the MAX_LOGPROBS likeliest under float32 logits [N, vocab]."""
    norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    top, top_ids = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[1]))
    rank = 1 + jnp.sum(logits > chosen, axis=-1)
    return Logprobs((chosen - norm)[:, 0], rank.astype(jnp.int32), top_ids.astype(jnp.int32), top - norm)


def _argmax(logits: jax.Array) -> jax.Array:
    """int32 [R]: the first index of each row's maximum."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """int32 keys in the order of the float32 values (IEEE 754: flip the magnitude bits of negatives)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _threshold(enough: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
    """Largest int32 t [R] with enough(t), a predicate that holds up to some t and fails above; int32 minimum if it
    never holds.
    """
    lowest = jnp.full(rows, jnp.iinfo(jnp.int32).min)
    start = jnp.where(enough(jnp.zeros(rows, jnp.int32)), 0, lowest)

    def refine(i: jax.Array, t: jax.Array) -> jax.Array:
        candidate = t + (jnp.int32(1) << (30 - i))
        return jnp.where(enough(candidate), candidate, t)

    return jax.lax.fori_loop(0, 31, refine, start)


def _uniform(seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """float32 [R] in [0, 1): threefry of (seed, position)."""

    def one(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(seed), position))

    return jax.vmap(one)(seeds, positions)


def _invert_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Index at which the running sum of weights [R, V] passes uniform * total; two levels, so that sums stay short."""
    rows, vocab = weights.shape
    blocks = -(-vocab // _CDF_BLOCK)
    padded = jnp.pad(weights, ((0, 0), (0, blocks * _CDF_BLOCK - vocab))).reshape(rows, blocks, _CDF_BLOCK)
    ends = jnp.cumsum(jnp.sum(padded, axis=-1), axis=-1)
    target = uniform * ends[:, -1]
    block = jnp.minimum(jnp.sum(ends <= target[:, None], axis=-1), blocks - 1)
    before = jnp.where(block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    passed = (jnp.cumsum(inside, axis=-1) > (target - before)[:, None]) & (inside > 0)
    # Rounding can leave the target just past a block's last weight: then the last positive one of the block is meant.
    last = _CDF_BLOCK - 1 - jnp.argmax(inside[:, ::-1] > 0, axis=-1)
    offset = jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), last)
    return (block * _CDF_BLOCK + offset).astype(jnp.int32)
