"""From the host's plan of a step to the arrays its executables read.

Everything of a step travels to the device as one int32 buffer (floats as their bits): one transfer a step. `Layout`
says where each field lies; the executables cut the same fields out again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.scheduler import Batch
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
        return sum(_aligned(math.prod(shape)) for _, shape, _ in self.fields)

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """The buffer's shape and type, for compilation ahead of time."""
        return jax.ShapeDtypeStruct((self.size,), jnp.int32)

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Writable host views of the fields."""
        return {name: buffer[at:end].view(dtype).reshape(shape) for name, shape, dtype, at, end in self._spans()}

    def unpack(self, buffer: jax.Array) -> dict[str, jax.Array]:
        """The same fields on the device, under jit."""
        return {
            name: jax.lax.bitcast_convert_type(buffer[at:end].reshape(shape), jnp.dtype(dtype))
            for name, shape, dtype, at, end in self._spans()
        }

    def _spans(self) -> Iterator[tuple[str, tuple[int, ...], str, int, int]]:
        at = 0
        for name, shape, dtype in self.fields:
            yield name, shape, dtype, at, at + math.prod(shape)
            at += _aligned(math.prod(shape))


def _aligned(count: int) -> int:
    """Elements up to the next 256 bytes: XLA passes a field to a Mosaic kernel in place, and those refuse less."""
    return -(-count // 64) * 64


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
            if row.seq.table_changed:
                first = row.start // self.page_size
                for table, pages in zip(self._tables, row.seq.tables, strict=True):
                    table[row.slot, first : len(pages)] = pages[first:]
                row.seq.table_changed = False

    def fill(self, v: dict[str, np.ndarray], slots: np.ndarray, row_of: np.ndarray, positions: np.ndarray) -> None:
        """Block tables of the rows and write slots of the tokens; row_of [tokens]: index into `slots` of each token."""
        for g, table in enumerate(self._tables):
            v[f"block_tables_{g}"][: len(slots)] = table[slots]
            pages = table[slots[row_of], positions // self.page_size]
            v[f"write_slots_{g}"][: len(positions)] = pages * self.page_size + positions % self.page_size
            v[f"write_slots_{g}"][len(positions) :] = -1


class RowArrays(NamedTuple):
    """A batch's rows as columns, int32 [rows] each; see `Row`."""

    slots: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    pending: np.ndarray
    samples: np.ndarray

    @classmethod
    def of(cls, batch: Batch) -> RowArrays:
        return cls(*np.array([row[1:] for row in batch.rows], np.int32).T)


def fill_forward(batch: Batch, rows: RowArrays, bucket: Bucket, layout: Layout, tables: BlockTables) -> np.ndarray:
    """The packed buffer of a step's forward pass. A fresh one each step: the device may still read the last one."""
    buffer = np.zeros(layout.size, np.int32)
    v = layout.views(buffer)
    n, total = len(batch.rows), int(rows.counts.sum())
    query_starts = v["query_starts"]
    np.cumsum(rows.counts, out=query_starts[1 : n + 1])
    query_starts[n + 1 :] = np.arange(n + 1, bucket.rows + 1) if bucket.decode else total
    v["kv_lens"][:n] = rows.starts + rows.counts
    v["pending_slots"][:] = -1
    v["pending_slots"][:n] = np.where(rows.pending, rows.slots, -1)
    row_of = np.repeat(np.arange(n), rows.counts)
    positions = rows.starts[row_of] + np.arange(total) - query_starts[row_of]
    v["positions"][:total] = positions
    tables.update(batch)
    tables.fill(v, rows.slots, row_of, positions)
    token_ids = v["token_ids"]
    known_counts = rows.counts - rows.pending
    for r in np.flatnonzero(known_counts).tolist():
        seq, _, start, *_ = batch.rows[r]
        at, known = query_starts[r], known_counts[r]
        token_ids[at : at + known] = seq.tokens[start : start + known]
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
