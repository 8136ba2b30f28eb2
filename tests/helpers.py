"""What tests of several areas share: paged caches and step inputs built by hand, golden files, errors."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from pjengine.step_inputs import CacheSpec, KVCache, LayerCache, StepInputs, cache_groups

GOLDEN = Path(__file__).parent / "golden"

Step = Callable[[StepInputs, KVCache], tuple[jax.Array, KVCache]]


def load_golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and metadata (decoded from JSON) of tests/golden/NAME/golden.safetensors; see scripts/make_golden.py."""
    with safe_open(GOLDEN / name / "golden.safetensors", framework="numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key != "format"}
    return arrays, metadata


def split_rows(tokens: np.ndarray, starts: np.ndarray) -> list[list[int]]:
    """Packed tokens [T] with borders [R + 1] to one list per row."""
    return [tokens[a:b].tolist() for a, b in itertools.pairwise(starts)]


def relative_error(actual: Any, expected: Any) -> float:
    """Euclidean norm of the difference over that of `expected`; NaN anywhere gives NaN, which no bound admits."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


class PagedSequences:
    """Sequences and the pages that hold them: shuffled, and poisoned with NaN until written.

    Page 0 holds large finite numbers instead: like a freed page, it may be read where a window hides it.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        specs: Sequence[CacheSpec],
        dtype: Any,
        page_size: int = 16,
        seed: int = 0,
    ):
        rng = np.random.default_rng(seed)
        self.sequences, self.page_size = sequences, page_size
        self.groups = cache_groups(specs)
        self.windows = list(dict.fromkeys(spec.window for spec in specs))
        max_pages = -(-max(map(len, sequences)) // page_size)
        pages = 1 + max_pages * len(sequences)
        self.tables = [
            rng.permutation(np.arange(1, pages, dtype=np.int32)).reshape(len(sequences), max_pages)
            for _ in self.windows
        ]

        def poisoned(spec: CacheSpec) -> jax.Array:
            shape = (pages, spec.kv_heads, page_size, spec.head_dim)
            return jnp.full(shape, jnp.nan, dtype).at[0].set(1000.0)

        self.cache = KVCache(tuple(LayerCache(poisoned(s), poisoned(s)) for s in specs), self.groups)

    def inputs(self, spans: Sequence[tuple[int, int]], tokens: int, *, decode: bool = False) -> StepInputs:
        """A step that computes the tokens [start, end) of each sequence; start == end: the row has nothing to do.

        Args:
          tokens: T, the step's static token count; the rest is padding.
          decode: spans hold one token or none; row r is token r.
        """
        assert not decode or tokens == len(spans)
        rows = np.repeat(np.arange(len(spans)), [end - start for start, end in spans])
        positions = np.concatenate([np.arange(start, end, dtype=np.int32) for start, end in spans])
        place = rows if decode else np.arange(len(rows))

        def padded(values: np.ndarray, fill: int) -> jax.Array:
            out = np.full(tokens, fill, np.int32)
            out[place] = values
            return jnp.asarray(out)

        token_ids = np.concatenate(
            [np.asarray(row[start:end], np.int32) for row, (start, end) in zip(self.sequences, spans, strict=True)]
        )
        page, offset = positions // self.page_size, positions % self.page_size
        write_slots = [table[rows, page] * self.page_size + offset for table in self.tables]
        counts = [1 if decode else end - start for start, end in spans]
        return StepInputs(
            token_ids=padded(token_ids, 0),
            positions=padded(positions, 0),
            query_starts=jnp.asarray(np.cumsum([0, *counts]), jnp.int32),
            kv_lens=jnp.asarray([end if end > start else 0 for start, end in spans], jnp.int32),
            write_slots=tuple(padded(slots, -1) for slots in write_slots),
            block_tables=tuple(
                jnp.asarray(self._without_freed(table, window, spans))
                for table, window in zip(self.tables, self.windows, strict=True)
            ),
            decode=decode,
        )

    def _without_freed(self, table: np.ndarray, window: int | None, spans: Sequence[tuple[int, int]]) -> np.ndarray:
        """The block table with the pages that no query of this step sees replaced by page 0."""
        if window is None:
            return table
        firsts = np.array([max(start - window + 1, 0) // self.page_size for start, _ in spans])
        return np.where(np.arange(table.shape[1]) < firsts[:, None], 0, table)

    def run(self, step: Step, chunks: Sequence[int], tokens: int, *, decode: bool = False) -> np.ndarray:
        """Feeds row r in pieces of chunks[r] tokens until all are computed.

        Returns: what `step` gives for each token, [sum of lengths, …], rows one after the other.
        """
        out: list[list[np.ndarray]] = [[] for _ in self.sequences]
        for spans in self._schedule(chunks):
            result, self.cache = step(self.inputs(spans, tokens, decode=decode), self.cache)
            values, at = np.asarray(result), 0
            for row, (start, end) in enumerate(spans):
                at = row if decode else at
                out[row].append(values[at : at + end - start])
                at += end - start
        return np.concatenate([piece for pieces in out for piece in pieces])

    def _schedule(self, chunks: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        done = [0] * len(self.sequences)
        while any(d < len(s) for d, s in zip(done, self.sequences, strict=True)):
            ends = [min(d + c, len(s)) for d, c, s in zip(done, chunks, self.sequences, strict=True)]
            yield list(zip(done, ends, strict=True))
            done = ends
