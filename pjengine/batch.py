"""From the host's plan of a step to the arrays its executables read.

Everything of a step travels to the device as one int32 buffer (floats as their bits): one transfer a step. `Layout`
says where each field lies; the executables cut the same fields out again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.scheduler import Batch
from pjengine.step_inputs import StepInputs

NOWHERE = 1 << 30  # a slot past every table: writes to it are dropped


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

    def shape(self, name: str) -> tuple[int, ...]:
        return next(shape for field, shape, _ in self.fields if field == name)

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


def forward_layout(bucket: Bucket, groups: int, page_size: int) -> Layout:
    tokens, rows = bucket.tokens, bucket.rows
    # A row's chunk touches the page it begins in, those it fills and the one it ends in.
    changes = rows if bucket.decode else 2 * rows + tokens // page_size
    return Layout(
        (
            ("token_ids", (tokens,), "int32"),
            ("query_starts", (rows + 1,), "int32"),
            ("kv_lens", (rows,), "int32"),
            ("slots", (rows,), "int32"),
            ("pending", (rows,), "int32"),  # 1: the row's last token is its slot's newest, not in token_ids
            *((f"changes_{g}", (changes, 3), "int32") for g in range(groups)),
        )
    )


def table_changes(batch: Batch, groups: int) -> list[np.ndarray]:
    """What a step must write to the device's block tables before it runs: per group int32 [changes, 3] of (slot, index
    in the slot's table, page).
    """
    found = []
    for g in range(groups):
        slots: list[int] = []
        indices: list[int] = []
        pages: list[int] = []
        for seq, first in batch.grown:
            table = seq.tables[g]
            count = len(table) - first
            slots += [seq.slot if seq.slot is not None else NOWHERE] * count
            indices += range(first, first + count)
            pages += table[first:]
        found.append(np.array([slots, indices, pages], np.int32).T)
    return found


def fill_forward(batch: Batch, bucket: Bucket, layout: Layout, changes: list[np.ndarray], slots: int) -> np.ndarray:
    """The packed buffer of a step's forward pass. A fresh one each step: the device may still read the last one.

    Args:
      changes: as `table_changes`, per group at most as many as the layout has room for.
      slots: how many there are; the one after the last is scratch.
    """
    buffer = np.zeros(layout.size, np.int32)
    v = layout.views(buffer)
    n, total = len(batch), batch.num_tokens
    query_starts = v["query_starts"]
    np.cumsum(batch.counts, out=query_starts[1 : n + 1])
    query_starts[n + 1 :] = np.arange(n + 1, bucket.rows + 1) if bucket.decode else total
    v["kv_lens"][:n] = batch.starts + batch.counts
    v["slots"][:n] = batch.slots
    v["slots"][n:] = slots
    v["pending"][:n] = batch.pending
    for g, found in enumerate(changes):
        v[f"changes_{g}"][: len(found)] = found
        v[f"changes_{g}"][len(found) :] = NOWHERE
    known = batch.counts - batch.pending
    token_ids = v["token_ids"]
    for r in np.flatnonzero(known).tolist():
        at, start, count = query_starts[r], batch.starts[r], known[r]
        token_ids[at : at + count] = batch.seqs[r].tokens[start : start + count]
    return buffer


def init_tables(groups: int, slots: int, max_pages: int) -> tuple[jax.Array, ...]:
    """The block tables of all slots on the device, per group int32 [slots + 1, max_pages]; the last slot is scratch.

    Entries past a sequence's pages are stale: valid pages that nobody reads.
    """
    return tuple(jnp.zeros((slots + 1, max_pages), jnp.int32) for _ in range(groups))


def write_tables(tables: tuple[jax.Array, ...], changes: list[jax.Array]) -> tuple[jax.Array, ...]:
    """The tables with int32 [changes, 3] of (slot, index, page) written; slot NOWHERE: nothing."""
    return tuple(t.at[c[:, 0], c[:, 1]].set(c[:, 2], mode="drop") for t, c in zip(tables, changes, strict=True))


def unpack_forward(
    packed: jax.Array,
    tail: jax.Array,
    tables: tuple[jax.Array, ...],
    bucket: Bucket,
    layout: Layout,
    page_size: int,
    backend: str,
) -> tuple[StepInputs, tuple[jax.Array, ...]]:
    """StepInputs under jit, and the block tables with the step's changes; tokens the host does not know yet come from
    `tail`.
    """
    v = layout.unpack(packed)
    tables = write_tables(tables, [v[f"changes_{g}"] for g in range(len(tables))])
    starts, kv_lens, slots = v["query_starts"], v["kv_lens"], v["slots"]
    token = jnp.arange(bucket.tokens)
    if bucket.decode:
        rows, valid = token, kv_lens > 0
    else:
        rows = jnp.searchsorted(starts[1:], token, side="right", method="compare_all")
        rows, valid = jnp.minimum(rows, bucket.rows - 1), rows < bucket.rows
    positions = jnp.where(valid, kv_lens[rows] - starts[rows + 1] + token, 0)
    last = jnp.where(v["pending"] == 1, starts[1:] - 1, bucket.tokens)
    write_slots = []
    for table in tables:
        pages = table[slots[rows], positions // page_size]
        write_slots.append(jnp.where(valid, pages * page_size + positions % page_size, -1))
    inputs = StepInputs(
        token_ids=v["token_ids"].at[last].set(tail[slots, -1], mode="drop"),
        positions=positions,
        query_starts=starts,
        kv_lens=kv_lens,
        write_slots=tuple(write_slots),
        block_tables=tuple(table[slots] for table in tables),
        decode=bucket.decode,
        backend=backend,
    )
    return inputs, tables
