"""Runs packed batches of whole sequences through a model and its head: one executable per bucket."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import time
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
from pjengine.token_budget import CurvePoint, describe, knee

logger = logging.getLogger(__name__)

_LONG_FROM = 512  # tokens: buckets from here on also come with few rows, for batches of long texts
_LONG = 64  # tokens of a text, on average, in those; in the others _SHORT
_SHORT = 8
_LINEAR_FROM = 1024  # tokens: from here on latency grows with them
_TIMED_LENGTH = 16  # tokens of each text in the batches whose time is measured
_TIMED = 4  # batches one behind the other whose time is measured


def embedding_buckets(largest: int, max_rows: int, *, gpu: bool) -> list[Bucket]:
    """Compiled shapes up to `largest` tokens.

    On a GPU batches of few tokens cost what one token costs, and then in proportion: powers of two where latency is
    flat, half steps from there on. Where a batch holds long texts, fewer rows let the attention kernel for long
    sequences serve it. On a CPU compiling costs more than padding.
    """
    powers = [1 << k for k in range(4 if gpu else 5, largest.bit_length(), 1 if gpu else 2)]
    halves = [3 * size // 2 for size in powers if gpu and size >= _LINEAR_FROM]
    sizes = [*(size for size in powers + halves if size < largest), largest]
    buckets = [Bucket(size, min(max_rows, max(8, size // _SHORT)), False) for size in sizes]
    if gpu:
        buckets += [Bucket(size, min(max_rows, size // _LONG), False) for size in sizes if size >= _LONG_FROM]
    return sorted(set(buckets))


@dataclasses.dataclass(frozen=True)
class RunningBatch:
    """Embeddings or logits on their way to the host."""

    results: Any  # jax.Array, whose `is_ready` its type leaves out
    count: int
    bucket_tokens: int

    @property
    def done(self) -> bool:
        return self.results.is_ready()

    def read(self) -> np.ndarray:
        """float32 [sequences, the head's size]; waits for the device."""
        return np.asarray(self.results)[: self.count]


class EmbeddingRunner:
    """A model with its head, compiled for `buckets`.

    Args:
      token_types: its batches bring segments.
      budget: tokens of a batch; None: the knee of this model on this device, measured here.
    """

    def __init__(
        self,
        module: ModuleType,
        model_config: Any,
        params: Any,
        head: Head,
        *,
        token_types: bool,
        budget: int | None,
        buckets: Sequence[Bucket],
        backend: str,
        store: ExecutableStore,
        progress: bool = True,
    ):
        self._params = params
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
        self.max_rows = max(b.rows for b in buckets)
        self.max_tokens = max(b.tokens for b in buckets)
        self.knee: CurvePoint | None = None
        if budget is None:
            curve = self.measure()
            self.knee = knee(curve)
            budget = self.knee.tokens
            logger.info("latency by tokens of a batch: %s", describe(curve))
            logger.info("batches get %d tokens: there the device is saturated", budget, extra={"phase": "knee"})
        self.budget = budget

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
        token_ids = itertools.chain.from_iterable(request.prompt_token_ids for request in requests)
        v["token_ids"][:total] = np.fromiter(token_ids, np.int32, total)
        if self._token_types:
            for request, at, length in zip(requests, starts.tolist(), lengths, strict=False):
                if request.token_type_ids is not None:
                    v["token_types"][at : at + length] = request.token_type_ids
        v["positions"][:total] = np.arange(total) - np.repeat(starts[: len(lengths)], lengths)
        results = self._executables[bucket](self._params, buffer)
        results.copy_to_host_async()
        return RunningBatch(results, len(lengths), bucket.tokens)

    def measure(self) -> list[CurvePoint]:
        """Seconds of full batches of each size, several one behind the other, as under load."""
        curve = []
        for bucket in sorted({b.tokens: b for b in sorted(self._executables)}.values()):  # of a size, the most rows
            count = min(bucket.rows, max(1, bucket.tokens // _TIMED_LENGTH))
            cuts = [bucket.tokens * i // count for i in range(count + 1)]
            texts = [
                Request(request_id="", prompt_token_ids=[0] * (end - begin)) for begin, end in itertools.pairwise(cuts)
            ]
            self.dispatch(texts).read()
            best = float("inf")
            for _ in range(2):
                started = time.perf_counter()
                batches = [self.dispatch(texts) for _ in range(_TIMED)]
                batches[-1].read()
                best = min(best, (time.perf_counter() - started) / _TIMED)
            curve.append(CurvePoint(bucket.tokens, best))
        return curve


def _layout(bucket: Bucket, token_types: bool) -> Layout:
    tokens = ["token_ids", "positions", *(["token_types"] if token_types else [])]
    return Layout(
        (*((name, (bucket.tokens,), "int32") for name in tokens), ("query_starts", (bucket.rows + 1,), "int32"))
    )
