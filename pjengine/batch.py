"""From the host's plan of a step to the arrays its executables read.

Everything of a step travels to the device as one int32 buffer (floats as their bits): one transfer a step. `Layout`
says where each field lies; the executables cut the same fields out again.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.sampler import TAIL, SamplingInputs, Variant
from pjengine.scheduler import Batch, Row
from pjengine.sequence import Sequence
from pjengine.step_inputs import StepInputs


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """A compiled static shape of the forward pass. decode: every row has one token, so `tokens == rows`."""

    tokens: int
    rows: int
    decode: bool

    def __str__(self) -> str:
        return f"decode {self.rows}" if self.decode else f"mixed {self.tokens} tokens, {self.rows} rows"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Named fields, one after the other in an int32 buffer. `fields`: (name, shape, dtype), dtypes 4 bytes wide."""

    fields: tuple[tuple[str, tuple[int, ...], str], ...]

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for _, shape, _ in self.fields)

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """The buffer's shape and type, for compilation ahead of time."""
        return jax.ShapeDtypeStruct((self.size,), jnp.int32)

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Writable host views of the fields."""
        out, at = {}, 0
        for name, shape, dtype in self.fields:
            count = math.prod(shape)
            out[name] = buffer[at : at + count].view(dtype).reshape(shape)
            at += count
        return out

    def unpack(self, buffer: jax.Array) -> dict[str, jax.Array]:
        """The same fields on the device, under jit."""
        out, at = {}, 0
        for name, shape, dtype in self.fields:
            count = math.prod(shape)
            field = buffer[at : at + count].reshape(shape)
            out[name] = field if dtype == "int32" else jax.lax.bitcast_convert_type(field, jnp.dtype(dtype))
            at += count
        return out


def forward_layout(bucket: Bucket, groups: int, max_pages: int) -> Layout:
    tokens, rows = bucket.tokens, bucket.rows
    fields: list[tuple[str, tuple[int, ...], str]] = [
        ("token_ids", (tokens,), "int32"),
        ("positions", (tokens,), "int32"),
        ("query_starts", (rows + 1,), "int32"),
        ("kv_lens", (rows,), "int32"),
        ("pending_slots", (rows,), "int32"),  # slot whose newest token is the row's last token; -1: it is in token_ids
    ]
    for g in range(groups):
        fields += [(f"write_slots_{g}", (tokens,), "int32"), (f"block_tables_{g}", (rows, max_pages), "int32")]
    return Layout(tuple(fields))


class BlockTables:
    """The block tables of all slots on the host: [slots, max_pages] per group, kept up to date step by step.

    A running sequence's table changes only from the page of its first computed token on, so only that part is copied;
    pages that a window has left keep their old entry, which the mask hides.
    """

    def __init__(self, groups: int, slots: int, max_pages: int, page_size: int):
        self.page_size = page_size
        self.max_pages = max_pages
        self._tables = [np.zeros((slots, max_pages), np.int32) for _ in range(groups)]

    def update(self, batch: Batch) -> None:
        for seq in batch.admitted:
            for table, pages in zip(self._tables, seq.tables, strict=True):
                table[seq.slot, : len(pages)] = pages
                table[seq.slot, len(pages) :] = 0
        for row in batch.rows:
            first = row.start // self.page_size
            for table, pages in zip(self._tables, row.seq.tables, strict=True):
                table[row.slot, first : len(pages)] = pages[first:]

    def fill(self, v: dict[str, np.ndarray], slots: np.ndarray, row_of: np.ndarray, positions: np.ndarray) -> None:
        """Block tables of the rows and write slots of the tokens; row_of [tokens]: index into `slots` of each token."""
        for g, table in enumerate(self._tables):
            v[f"block_tables_{g}"][: len(slots)] = table[slots]
            pages = table[slots[row_of], positions // self.page_size]
            v[f"write_slots_{g}"][: len(positions)] = pages * self.page_size + positions % self.page_size
            v[f"write_slots_{g}"][len(positions) :] = -1


def fill_forward(batch: Batch, bucket: Bucket, layout: Layout, tables: BlockTables) -> np.ndarray:
    """The packed buffer of a step's forward pass. A fresh one each step: the device may still read the last one."""
    buffer = np.zeros(layout.size, np.int32)
    v = layout.views(buffer)
    rows, n = batch.rows, len(batch.rows)
    slots = np.fromiter((row.slot for row in rows), np.int32, n)
    start = np.fromiter((row.start for row in rows), np.int32, n)
    count = np.fromiter((row.count for row in rows), np.int32, n)
    pending = np.fromiter((row.pending for row in rows), np.bool_, n)
    total = int(count.sum())
    query_starts = v["query_starts"]
    np.cumsum(count, out=query_starts[1 : n + 1])
    query_starts[n + 1 :] = np.arange(n + 1, bucket.rows + 1) if bucket.decode else total
    v["kv_lens"][:n] = start + count
    v["pending_slots"][:] = -1
    v["pending_slots"][:n] = np.where(pending, slots, -1)
    row_of = np.repeat(np.arange(n), count)
    positions = start[row_of] + np.arange(total) - query_starts[row_of]
    v["positions"][:total] = positions
    tables.update(batch)
    tables.fill(v, slots, row_of, positions)
    token_ids = v["token_ids"]
    for row, at in zip(rows, query_starts.tolist(), strict=False):
        if not row.pending:
            token_ids[at : at + row.count] = row.seq.tokens[row.start : row.start + row.count]
        elif row.count > 1:
            token_ids[at : at + row.count - 1] = row.seq.tokens[row.start : row.start + row.count - 1]
    return buffer


def unpack_forward(
    packed: jax.Array, tail: jax.Array, bucket: Bucket, layout: Layout, groups: int, backend: str
) -> StepInputs:
    """StepInputs under jit; tokens the host does not know yet come from `tail`."""
    v = layout.unpack(packed)
    pending = v["pending_slots"]
    last = jnp.maximum(v["query_starts"][1:] - 1, 0)
    at = jnp.where(pending >= 0, last, bucket.tokens)
    token_ids = v["token_ids"].at[at].set(tail[jnp.maximum(pending, 0), -1], mode="drop")
    return StepInputs(
        token_ids=token_ids,
        positions=v["positions"],
        query_starts=v["query_starts"],
        kv_lens=v["kv_lens"],
        write_slots=tuple(v[f"write_slots_{g}"] for g in range(groups)),
        block_tables=tuple(v[f"block_tables_{g}"] for g in range(groups)),
        decode=bucket.decode,
        backend=backend,
    )


@dataclasses.dataclass(frozen=True, order=True)
class SamplerKey:
    """A compiled static shape of the sampler: rows, what it can do, adjusted tokens and forbidden words per row."""

    rows: int
    variant: Variant
    biases: int = 0
    bad_words: int = 0


def sampler_layout(key: SamplerKey) -> Layout:
    rows = (key.rows,)
    floats = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
    return Layout(
        (
            ("slots", rows, "int32"),
            ("positions", rows, "int32"),
            ("seeds", (key.rows, 2), "uint32"),
            ("top_k", rows, "int32"),
            ("allow_only", rows, "int32"),
            *((name, rows, "float32") for name in floats),
            ("bias_ids", (key.rows, key.biases), "int32"),
            ("bias", (key.rows, key.biases), "float32"),
            ("bad_words", (key.rows, key.bad_words, TAIL), "int32"),
        )
    )


def sampler_key(batch: Batch, rows: int, eos: frozenset[int]) -> SamplerKey:
    """The smallest sampler that covers every row that samples."""
    variant, biases, words = Variant.GREEDY, 0, 0
    for row in batch.rows:
        if not row.samples:
            continue
        params = row.seq.params
        if params.logprobs is not None:
            variant = Variant.LOGPROBS
        elif not _plain_greedy(row, eos):
            variant = max(variant, Variant.SAMPLE)
        biases = max(biases, len(adjustments(row, eos)[0]))
        words = max(words, len(params.bad_words_token_ids))
    return SamplerKey(rows, variant, _round_up(biases, 64), _round_up(words, 16))


def fill_sampler(batch: Batch, key: SamplerKey, layout: Layout, scratch: int, eos: frozenset[int]) -> np.ndarray:
    """The packed buffer of a step's sampler. scratch: the slot that rows which sample nothing write to."""
    buffer = np.zeros(layout.size, np.int32)
    v = layout.views(buffer)
    v["slots"][:] = scratch
    v["top_p"][:] = v["repetition"][:] = 1.0
    v["bias_ids"][:] = v["bad_words"][:] = -1
    for r, row in enumerate(batch.rows):
        if not row.samples:
            continue
        v["slots"][r] = row.slot
        if key.variant is Variant.GREEDY:
            continue
        params = row.seq.params
        v["positions"][r] = row.position
        v["seeds"][r] = (row.seq.seed & 0xFFFFFFFF, row.seq.seed >> 32)
        v["temperature"][r] = params.temperature
        v["top_p"][r] = params.top_p
        v["top_k"][r] = params.top_k
        v["min_p"][r] = params.min_p
        v["presence"][r] = params.presence_penalty
        v["frequency"][r] = params.frequency_penalty
        v["repetition"][r] = params.repetition_penalty
        if key.biases:
            ids, values = adjustments(row, eos)
            v["allow_only"][r] = params.allowed_token_ids is not None
            v["bias_ids"][r, : len(ids)] = ids
            v["bias"][r, : len(ids)] = values
        for w, word in enumerate(params.bad_words_token_ids):
            v["bad_words"][r, w, TAIL - len(word) :] = word
    return buffer


def unpack_sampler(packed: jax.Array, layout: Layout) -> SamplingInputs:
    return SamplingInputs(**layout.unpack(packed))


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
    p = seq.params
    return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0 or p.bad_words_token_ids)


def wants_prompt_logprobs(row: Row) -> bool:
    seq = row.seq
    return (
        seq.params.prompt_logprobs is not None
        and seq.index == 0
        and seq.first_token is None
        and row.start < seq.prompt_len - 1
    )


def _plain_greedy(row: Row, eos: frozenset[int]) -> bool:
    return row.seq.params.greedy and not needs_state(row.seq) and not adjustments(row, eos)[0]


def _round_up(count: int, smallest: int) -> int:
    """0, or `smallest` times the power of 4 that covers the count: few shapes to compile."""
    size = smallest
    while size < count:
        size *= 4
    return size if count else 0
