"""From what each row of a step asks for to the arrays its sampler reads."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from pjengine.batch import Layout
from pjengine.sampler import TAIL, SamplingInputs, Variant, variant_of
from pjengine.scheduler import Batch, Row
from pjengine.sequence import Sequence

_NUMBERS = {  # fields of SamplingInputs that are one number of SamplingParams, and what leaves a row alone
    "top_k": ("top_k", "int32", 0),
    "temperature": ("temperature", "float32", 0.0),
    "top_p": ("top_p", "float32", 1.0),
    "min_p": ("min_p", "float32", 0.0),
    "presence": ("presence_penalty", "float32", 0.0),
    "frequency": ("frequency_penalty", "float32", 0.0),
    "repetition": ("repetition_penalty", "float32", 1.0),
}


@dataclasses.dataclass(frozen=True, order=True)
class SamplerKey:
    """A compiled static shape of the sampler: rows, what it can do, adjusted tokens and forbidden words per row."""

    rows: int
    variant: Variant
    penalties: bool = False
    biases: int = 0
    bad_words: int = 0

    def covers(self, other: SamplerKey) -> bool:
        """Whether its executable can do the other's work."""
        return (
            self.rows == other.rows
            and self.variant >= other.variant
            and self.penalties >= other.penalties
            and self.biases >= other.biases
            and self.bad_words >= other.bad_words
        )


def sampler_layout(key: SamplerKey) -> Layout:
    rows = (key.rows,)
    return Layout(
        (
            ("slots", rows, "int32"),
            ("positions", rows, "int32"),
            ("seeds", (key.rows, 2), "uint32"),
            ("allow_only", rows, "int32"),
            *((name, rows, dtype) for name, (_, dtype, _) in _NUMBERS.items()),
            ("bias_ids", (key.rows, key.biases), "int32"),
            ("bias", (key.rows, key.biases), "float32"),
            ("bad_words", (key.rows, key.bad_words, TAIL), "int32"),
        )
    )


def unpack_sampler(packed: jax.Array, layout: Layout) -> SamplingInputs:
    """SamplingInputs under jit."""
    return SamplingInputs(**layout.unpack(packed))


class SamplingTable:
    """The sampling parameters of all slots on the host, written once when a sequence gets its slot.

    The last slot is scratch: rows that sample nothing read and write there.
    """

    def __init__(self, slots: int, eos: frozenset[int]):
        self._eos = eos
        self._scratch = slots
        self._numbers = {name: np.full(slots + 1, idle, dtype) for name, (_, dtype, idle) in _NUMBERS.items()}
        self._seeds = np.zeros((slots + 1, 2), np.uint32)
        self._variants = np.zeros(slots + 1, np.int8)
        self._penalties = np.zeros(slots + 1, np.bool_)
        self._logprobs = np.zeros(slots + 1, np.bool_)
        self._listing = np.zeros(slots + 1, np.bool_)  # has biases or forbidden words, or may have

    def load(self, seq: Sequence) -> None:
        slot, params = seq.slot, seq.params
        for name, (field, _, _) in _NUMBERS.items():
            self._numbers[name][slot] = getattr(params, field)
        self._seeds[slot] = seq.seed & 0xFFFFFFFF, seq.seed >> 32
        listing = bool(
            params.logit_bias or params.allowed_token_ids is not None or params.min_tokens or params.bad_words_token_ids
        )
        self._listing[slot] = listing
        self._penalties[slot] = _has_penalties(seq)
        self._logprobs[slot] = params.logprobs is not None
        if params.greedy:
            self._numbers["temperature"][slot] = 0.0
            self._variants[slot] = Variant.PLAIN if listing or needs_state(seq) else Variant.GREEDY
        else:
            self._variants[slot] = variant_of(params.top_k, params.top_p)

    def key(self, batch: Batch, bucket_rows: int) -> SamplerKey:
        """The smallest sampler that covers every row that samples."""
        slots = self._slots(batch)
        biases = words = 0
        for r in np.flatnonzero(self._listing[slots]).tolist():
            biases = max(biases, len(adjustments(batch.row(r), self._eos)[0]))
            words = max(words, len(batch.row(r).seq.params.bad_words_token_ids))
        variant = Variant(int(self._variants[slots].max()))
        penalties = bool(self._penalties[slots].any())
        return SamplerKey(bucket_rows, variant, penalties, _round_up(biases, 64), _round_up(words, 16))

    def wants_logprobs(self, batch: Batch) -> bool:
        return bool(self._logprobs[self._slots(batch)].any())

    def fill(self, batch: Batch, key: SamplerKey, layout: Layout) -> np.ndarray:
        """The packed buffer of a step's sampler."""
        buffer = np.zeros(layout.size, np.int32)
        v = layout.views(buffer)
        slots = v["slots"]
        slots[:] = self._scratch
        slots[: len(batch)] = self._slots(batch)
        if key.variant is Variant.GREEDY:
            return buffer
        v["positions"][: len(batch)] = batch.starts + batch.counts
        v["seeds"][:] = self._seeds[slots]
        for name, numbers in self._numbers.items():
            v[name][:] = numbers[slots]
        v["bias_ids"][:] = v["bad_words"][:] = -1
        for r in np.flatnonzero(self._listing[slots]).tolist():
            params = batch.row(r).seq.params
            ids, values = adjustments(batch.row(r), self._eos)
            v["allow_only"][r] = params.allowed_token_ids is not None
            v["bias_ids"][r, : len(ids)] = ids
            v["bias"][r, : len(ids)] = values
            for w, word in enumerate(params.bad_words_token_ids):
                v["bad_words"][r, w, TAIL - len(word) :] = word
        return buffer

    def _slots(self, batch: Batch) -> np.ndarray:
        return np.where(batch.samples, batch.slots, self._scratch)


def adjustments(row: Row, eos: frozenset[int]) -> tuple[list[int], list[float]]:
    """Tokens whose logits change (each once), and by how much: biases, allowed tokens, no early end."""
    params = row.seq.params
    if not params.logit_bias and params.allowed_token_ids is None and not params.min_tokens:
        return [], []
    changes: dict[int, float] = dict.fromkeys(params.allowed_token_ids or (), 0.0)
    for token, bias in (params.logit_bias or {}).items():
        if params.allowed_token_ids is None or token in changes:
            changes[token] = bias
    if row.position - row.seq.prompt_len < params.min_tokens:
        for token in (*(() if params.ignore_eos else eos), *params.stop_token_ids):
            if params.allowed_token_ids is None or token in changes:
                changes[token] = -math.inf
    return list(changes), list(changes.values())


def needs_state(seq: Sequence) -> bool:
    """Whether sampling looks at tokens the sequence had before it got its slot."""
    return _has_penalties(seq) or bool(seq.params.bad_words_token_ids)


def _has_penalties(seq: Sequence) -> bool:
    p = seq.params
    return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0)


def wants_prompt_logprobs(row: Row) -> bool:
    seq = row.seq
    return (
        seq.params.prompt_logprobs is not None
        and seq.index == 0
        and seq.first_token is None
        and row.start < seq.prompt_len - 1
    )


def _round_up(count: int, smallest: int) -> int:
    """0, or `smallest` times the power of 4 that covers the count: few shapes to compile."""
    size = smallest
    while size < count:
        size *= 4
    return size if count else 0
