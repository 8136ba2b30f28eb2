"""Runs packed batches of whole sequences through a model and its head: one executable per bucket."""

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
from pjengine.models import heads
from pjengine.models.heads import Head
from pjengine.request import Request
from pjengine.step_inputs import StepInputs

_SMALLEST = 32  # tokens of the smallest bucket


@dataclasses.dataclass(frozen=True)
class RunningBatch:
    """Embeddings or logits on their way to the host."""

    results: jax.Array
    count: int
    bucket_tokens: int

    def read(self) -> np.ndarray:
        """float32 [sequences, the head's size]; waits for the device."""
        return np.asarray(self.results)[: self.count]


class EmbeddingRunner:
    """A model with its head, compiled for token buckets up to a budget. token_types: its batches bring segments."""

    def __init__(
        self,
        module: ModuleType,
        model_config: Any,
        params: Any,
        head: Head,
        *,
        token_types: bool,
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
        self._token_types = token_types
        self._layouts = {b: _layout(b, token_types) for b in buckets}

        def run(params: Any, packed: jax.Array, bucket: Bucket) -> jax.Array:
            v = _layout(bucket, token_types).unpack(packed)
            inputs = StepInputs(
                token_ids=v["token_ids"],
                positions=v["positions"],
                query_starts=v["query_starts"],
                kv_lens=jnp.diff(v["query_starts"]),
                token_types=v.get("token_types"),
                backend=backend,
            )
            hidden, _ = module.forward(params, inputs, None, model_config)
            return heads.apply(head, params, hidden, inputs)

        jitted = jax.jit(run, static_argnums=2)
        self._executables = compile_all(
            {b: functools.partial(jitted.lower, params, self._layouts[b].abstract, b) for b in buckets},
            "batches",
            store,
            progress,
        )

    def dispatch(self, requests: Sequence[Request]) -> RunningBatch:
        """Starts a batch of at most `max_rows` requests and `budget` tokens in all; returns at once."""
        lengths = [len(request.prompt_token_ids) for request in requests]
        total = sum(lengths)
        bucket = min(b for b in self._executables if b.tokens >= total and b.rows >= len(lengths))
        layout = self._layouts[bucket]
        buffer = np.zeros(layout.size, np.int32)
        v = layout.views(buffer)
        starts = v["query_starts"]
        starts[1 : len(lengths) + 1] = np.cumsum(lengths)
        starts[len(lengths) + 1 :] = total
        for request, at, length in zip(requests, starts.tolist(), lengths, strict=False):
            v["token_ids"][at : at + length] = request.prompt_token_ids
            if self._token_types and request.token_type_ids is not None:
                v["token_types"][at : at + length] = request.token_type_ids
        v["positions"][:total] = np.arange(total) - np.repeat(starts[: len(lengths)], lengths)
        results = self._executables[bucket](self._params, buffer)
        results.copy_to_host_async()
        return RunningBatch(results, len(lengths), bucket.tokens)


def _layout(bucket: Bucket, token_types: bool) -> Layout:
    tokens = ["token_ids", "positions", *(["token_types"] if token_types else [])]
    return Layout(
        (*((name, (bucket.tokens,), "int32") for name in tokens), ("query_starts", (bucket.rows + 1,), "int32"))
    )
