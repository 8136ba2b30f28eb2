"""Which tokens of a distribution may be drawn, and the draw: all sums in integers, so that every way to a token agrees.

A row's probabilities become integer weights, the likeliest token's being HEAVIEST. Top-k and top-p keep a prefix of the
tokens ordered by (weight, descending; id, ascending), described by its last token, a `Cut`. Sums of integers do not
depend on their order: a row gets the same token alone or in a batch, and whichever function below found its cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pjengine.wide import Wide, add_each, cumulate, divide_up, less, minus, narrow, plus, scale, total, totals, widen

BLOCK = 128  # tokens reduced together first; the sum of their weights fits in int32
CANDIDATES = 64  # the largest top-k that is cut without a search
HEAVIEST = (1 << 24) - 1  # a token 2^25 times less likely than the likeliest weighs nothing
_PART = 8  # tokens looked at together among those of the best blocks
_WEIGHT_BITS = 24
_DIGIT_BITS = 3  # that each pass of a search finds


@dataclasses.dataclass(frozen=True)
class Rows:
    """A value for each token of R rows, as an expression that XLA computes where it is used rather than writing it out:
    reductions read `blocks`, and gathers, for which an array would have to be written, call `at`.

    Attributes:
      blocks: [R, blocks, BLOCK]; what comes after the last token holds `at`'s value for such ids.
      at: ids int32 [R, n] -> [R, n].
    """

    blocks: jax.Array
    at: Callable[[jax.Array], jax.Array]

    @classmethod
    def of(cls, logits: jax.Array) -> Rows:
        """logits: float32 [R, vocab]; -inf for ids beyond."""
        vocab = logits.shape[1]

        def at(ids: jax.Array) -> jax.Array:
            values = jnp.take_along_axis(logits, jnp.minimum(ids, vocab - 1), axis=1)
            return jnp.where(ids < vocab, values, -jnp.inf)

        return cls(to_blocks(logits), at)

    def map(self, function: Callable[[jax.Array], jax.Array]) -> Rows:
        """function: elementwise, on [R, ...]."""
        return Rows(function(self.blocks), lambda ids: function(self.at(ids)))

    def block_at(self, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        """block int32 [R] -> ids and values of its tokens, [R, BLOCK]."""
        ids = block[:, None] * BLOCK + jnp.arange(BLOCK)
        return ids, self.at(ids)


class Cut(NamedTuple):
    """Keeps tokens heavier than `weight`, and those of this weight up to the id `last`. int32 [R] each."""

    weight: jax.Array
    last: jax.Array


def to_blocks(values: jax.Array) -> jax.Array:
    """float32 [R, vocab] -> [R, blocks, BLOCK], -inf after the last token."""
    padding = -values.shape[1] % BLOCK
    return jnp.pad(values, ((0, 0), (0, padding)), constant_values=-jnp.inf).reshape(values.shape[0], -1, BLOCK)


def rowwise(x: jax.Array, like: jax.Array) -> jax.Array:
    """x [R] for arithmetic with `like` [R, ...]."""
    return x.reshape(-1, *(1,) * (like.ndim - 1))


def first(maxima: jax.Array, rows: Rows, count: int) -> tuple[jax.Array, jax.Array]:
    """Ids int32 and values of each row's largest `count` (or all) tokens, in descending order; the lower id first among
    equals. [R, count] each.

    They lie in as many blocks, those with the largest maxima: each of these holds a token that comes before every token
    of any other block. The same holds for the parts of these blocks.

    Args:
      maxima: [R, blocks]: of `rows.blocks`.
    """
    blocks, _ = _sorted(jnp.broadcast_to(jnp.arange(maxima.shape[1]), maxima.shape), maxima, count)
    parts = _expand(blocks, BLOCK // _PART)
    values = rows.at(_expand(parts, _PART)).reshape(*parts.shape, _PART)
    parts, _ = _sorted(parts, jnp.max(values, axis=2), count)
    ids = _expand(parts, _PART)
    return _sorted(ids, rows.at(ids), count)


def to_weights(logits: jax.Array, top: jax.Array, temperature: jax.Array) -> jax.Array:
    """int32 like float32 logits [R, ...]: exp((logits - top) / temperature) scaled to HEAVIEST.

    Args:
      top: float32 [R], each row's largest logit; finite.
      temperature: float32 [R], above 0.
    """
    scaled = (logits - rowwise(top, logits)) * rowwise(1 / temperature, logits)
    return jnp.round(jnp.exp(scaled) * HEAVIEST).astype(jnp.int32)


def keep(cut: Cut, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """Weights int32 [R, ...] of the kept tokens, 0 for the others. ids broadcasts to weights."""
    weight, last = rowwise(cut.weight, weights), rowwise(cut.last, weights)
    return jnp.where(weights + (ids <= last) > weight, weights, 0)


def keep_all(rows: int) -> Cut:
    return Cut(jnp.zeros(rows, jnp.int32), jnp.full(rows, -1, jnp.int32))


def tighter(a: Cut, b: Cut) -> Cut:
    """What both keep."""
    return _select((a.weight > b.weight) | ((a.weight == b.weight) & (a.last < b.last)), a, b)


def cut_min_p(min_p: jax.Array) -> Cut:
    """Keeps tokens at least min_p float32 [R] times as likely as the likeliest."""
    least = jnp.ceil(min_p * HEAVIEST).astype(jnp.int32)
    return Cut(least, jnp.full(min_p.shape, jnp.iinfo(jnp.int32).max, jnp.int32))


def cut_candidates(heaviest: jax.Array, weights: Rows, top_k: jax.Array, top_p: jax.Array) -> Cut:
    """Top-k, then top-p of what that keeps, for rows whose top_k is in 1..CANDIDATES; the others keep all.

    Args:
      heaviest: int32 [R, blocks]: the heaviest weight of each block.
      top_k, top_p: int32 and float32 [R].
    """
    ids, ordered = first(heaviest, weights, CANDIDATES)
    ordered = jnp.where(jnp.arange(ordered.shape[1]) < top_k[:, None], ordered, 0)
    sums = jnp.cumsum(ordered, axis=1)  # below 2^30
    target = jax.tree.map(lambda x: x[:, None], _part(top_p, widen(sums[:, -1])))
    kept = less(widen(sums - ordered), target) & (ordered > 0)
    last = jnp.maximum(jnp.sum(kept, axis=1, keepdims=True) - 1, 0)
    cut = Cut(*(jnp.take_along_axis(x, last, axis=1)[:, 0] for x in (ordered, ids)))
    return _select((top_k > 0) & (top_k <= CANDIDATES), cut, keep_all(ids.shape[0]))


def cut_top_k(weights: Rows, top_k: jax.Array) -> Cut:
    """For any top_k int32 [R]; 0 or less keeps all."""
    cut = _search(weights, widen(jnp.maximum(top_k, 1)), lambda w: (w > 0).astype(jnp.int32))
    return _select(top_k > 0, cut, keep_all(top_k.shape[0]))


def cut_top_p(weights: Rows, top_p: jax.Array, within: Cut) -> Cut:
    """The smallest prefix with at least top_p float32 [R] of the weight that `within` keeps; 1 or more keeps all."""
    mass = total(jnp.sum(keep(within, _block_ids(weights), weights.blocks), axis=2))
    cut = _search(weights, _part(top_p, mass), lambda w: w)
    return _select(top_p < 1, cut, keep_all(top_p.shape[0]))


def draw(weights: Rows, cut: Cut, random: jax.Array) -> jax.Array:
    """A token per row, int32 [R], as likely as its share of the kept weight. Undefined in a row without weight.

    Args:
      random: uint32 [R], uniform: the place in the row's cumulative distribution.
    """
    sums = jnp.sum(keep(cut, _block_ids(weights), weights.blocks), axis=2)
    ends = cumulate(sums)
    target, _ = scale(random, jax.tree.map(lambda x: x[:, -1], ends))
    block = jnp.sum(~less(jax.tree.map(lambda x: x[:, None], target), ends), axis=1, dtype=jnp.int32)
    end = jax.tree.map(lambda x: _pick(x, block), ends)
    into = _pick(sums, block) - narrow(minus(end, target))  # the target lies in this block: 32 bits do
    ids, inside = weights.block_at(block)
    passed = jnp.cumsum(keep(cut, ids, inside), axis=1) <= into[:, None]
    return block * BLOCK + jnp.sum(passed, axis=1, dtype=jnp.int32)


def _search(weights: Rows, target: Wide, measure: Callable[[jax.Array], jax.Array]) -> Cut:
    """The smallest prefix of the order whose tokens' measures sum to `target` [R], above 0, or all that weigh anything.

    Each pass compares with 7 thresholds, which fixes 3 bits of the last token's weight.

    Args:
      measure: weights -> int32, elementwise; 0 for 0.
    """
    blocks = weights.blocks
    measured = measure(blocks)

    def sums_from(least: list[jax.Array]) -> Wide:
        """[len(least), R], in one pass over the weights."""
        values = tuple(jnp.where(blocks >= rowwise(x, blocks), measured, 0) for x in least)
        return totals(jax.lax.reduce(values, (jnp.int32(0),) * len(least), add_each, (2,)))

    def refine(i: jax.Array, weight: jax.Array) -> jax.Array:
        shift = _WEIGHT_BITS - _DIGIT_BITS * (i + 1)
        sums = sums_from([weight + (jnp.int32(digit) << shift) for digit in range(1, 1 << _DIGIT_BITS)])
        return weight + (jnp.sum(~less(sums, target), axis=0, dtype=jnp.int32) << shift)

    weight = jax.lax.fori_loop(0, _WEIGHT_BITS // _DIGIT_BITS, refine, jnp.zeros_like(target.low, jnp.int32))
    ties = jnp.sum(blocks == rowwise(weight, blocks), axis=2, dtype=jnp.int32)
    above = jax.tree.map(lambda x: x[0], sums_from([weight + 1]))
    wanted = divide_up(minus(target, above), jnp.maximum(measure(weight), 1))
    ends = jnp.cumsum(ties, axis=1)
    block = jnp.minimum(jnp.sum(ends < wanted[:, None], axis=1, dtype=jnp.int32), ties.shape[1] - 1)
    _, inside = weights.block_at(block)
    left = wanted - (_pick(ends, block) - _pick(ties, block))
    passed = jnp.cumsum(inside == weight[:, None], axis=1) < left[:, None]
    return Cut(weight, block * BLOCK + jnp.sum(passed, axis=1, dtype=jnp.int32))


def _part(top_p: jax.Array, mass: Wide) -> Wide:
    """top_p float32 [R] times mass, rounded up."""
    bits = jnp.maximum(jnp.minimum(top_p, 1 - 2**-24) * 2.0**32, 1).astype(jnp.uint32)
    part, rest = scale(bits, mass)
    return jax.tree.map(
        lambda some, every: jnp.where(top_p < 1, some, every), plus(part, rest.astype(jnp.uint32)), mass
    )


def _sorted(ids: jax.Array, values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    order, ids = jax.lax.sort((-values, ids), dimension=1, num_keys=2)
    return ids[:, :count], -order[:, :count]


def _expand(index: jax.Array, size: int) -> jax.Array:
    """Indices [R, n] of groups of `size` -> those of their members, [R, n * size]."""
    return (index[:, :, None] * size + jnp.arange(size)).reshape(index.shape[0], -1)


def _block_ids(rows: Rows) -> jax.Array:
    return jnp.arange(rows.blocks.shape[1])[:, None] * BLOCK + jnp.arange(BLOCK)


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]


def _select(condition: jax.Array, yes: Cut, no: Cut) -> Cut:
    return Cut(*(jnp.where(condition, a, b) for a, b in zip(yes, no, strict=True)))
