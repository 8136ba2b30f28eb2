"""Runs packed batches of whole sequences through a model and pools them: one executable per bucket."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.batch import Bucket, Layout
from pjengine.executables import ExecutableStore, compile_all
from pjengine.models.pooling import pool
from pjengine.models.sources import Pooling
from pjengine.step_inputs import StepInputs

_SMALLEST = 32  # tokens of the smallest bucket


@dataclasses.dataclass(frozen=True)
class RunningBatch:
    """Embeddings on their way to the host."""

    vectors: jax.Array
    count: int
    bucket_tokens: int

    def read(self) -> np.ndarray:
        """float32 [sequences, hidden_size]; waits for the device."""
        return np.asarray(self.vectors)[: self.count]


class EmbeddingRunner:
    """A model with its pooling, compiled for token buckets up to a budget."""

    def __init__(
        self,
        module: ModuleType,
        model_config: Any,
        params: Any,
        pooling: Pooling | None,
        *,
        budget: int,
        max_rows: int,
        growth: int,
        backend: str,
        store: ExecutableStore,
        progress: bool = True,
    ):
        self.budget = budget
        self.max_rows = max_rows
        self._params = params
        sizes = [min(_SMALLEST, budget)]
        while sizes[-1] < budget:
            sizes.append(min(sizes[-1] * growth, budget))
        buckets = [
            Bucket(size, min(max_rows, max(8, size // 8)) if size < budget else max_rows, False) for size in sizes
        ]
        self._layouts = {b: _layout(b) for b in buckets}
        mode, normalize = (pooling.mode, pooling.normalize) if pooling else ("cls", True)

        def embed(params: Any, packed: jax.Array, bucket: Bucket) -> jax.Array:
            v = _layout(bucket).unpack(packed)
            inputs = StepInputs(
                token_ids=v["token_ids"],
                positions=v["positions"],
                query_starts=v["query_starts"],
                kv_lens=jnp.diff(v["query_starts"]),
                backend=backend,
            )
            hidden, _ = module.forward(params, inputs, None, model_config)
            return pool(hidden, inputs, mode, normalize)

        jitted = jax.jit(embed, static_argnums=2)
        self._executables = compile_all(
            {b: functools.partial(jitted.lower, params, self._layouts[b].abstract, b) for b in buckets},
            "embedding batches",
            store,
            progress,
        )

    def dispatch(self, sequences: Sequence[Sequence[int]]) -> RunningBatch:
        """Starts a batch of at most `max_rows` sequences and `budget` tokens in all; returns at once."""
        lengths = [len(s) for s in sequences]
        total = sum(lengths)
        bucket = min(b for b in self._executables if b.tokens >= total and b.rows >= len(lengths))
        layout = self._layouts[bucket]
        buffer = np.zeros(layout.size, np.int32)
        v = layout.views(buffer)
        starts = v["query_starts"]
        starts[1 : len(lengths) + 1] = np.cumsum(lengths)
        starts[len(lengths) + 1 :] = total
        for sequence, at in zip(sequences, starts.tolist(), strict=False):
            v["token_ids"][at : at + len(sequence)] = sequence
        v["positions"][:total] = np.arange(total) - np.repeat(starts[: len(lengths)], lengths)
        vectors = self._executables[bucket](self._params, buffer)
        vectors.copy_to_host_async()
        return RunningBatch(vectors, len(lengths), bucket.tokens)


def _layout(bucket: Bucket) -> Layout:
    return Layout(
        (
            ("token_ids", (bucket.tokens,), "int32"),
            ("positions", (bucket.tokens,), "int32"),
            ("query_starts", (bucket.rows + 1,), "int32"),
        )
    )
