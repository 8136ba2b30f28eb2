"""Runs packed batches of whole sequences through a model and its head: one executable per bucket."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.batch import Bucket, Layout
from pjengine.compilation import CUBLAS, IN_LINE, IN_PIECES, QUIET_TRIALS, compile_all
from pjengine.cuda_driver import DeviceCopies
from pjengine.executables import ExecutableStore
from pjengine.models import heads
from pjengine.models.heads import Head
from pjengine.pallas_kernels.encoder_stack.api import TOKENS as FEW_TOKENS
from pjengine.pallas_kernels.packed.support import LONG
from pjengine.request import Request
from pjengine.step_inputs import StepInputs
from pjengine.token_budget import CurvePoint, describe, knee, measure_curve

logger = logging.getLogger(__name__)

# Tokens of the compiled shapes. On a GPU few tokens cost what one costs, so padding is free; from some thousand on each
# has its price. On a CPU every padding token has, but compiling costs more.
_GPU_SIZES = (FEW_TOKENS, 64, 256, 512, 1024, 2048, 3072, 4096, 6144, 8192)
_CPU_SIZES = (32, 128, 512)
_SHORT = 8  # tokens of a text, on average, for which a shape has rows
_LONG_FROM = 2048  # tokens of the smallest shape for long texts, which is there if texts may be as long
# Tokens from which on cuBLAS takes all products of a batch: it is at the speed of the tensor cores, and its epilogues
# spare passes over activations. With few tokens Triton's products that split the inner dimension are faster.
_CUBLAS_FROM = 2048
# Below so many tokens the device is done with a batch before the host has launched the next one's graph, which also
# waits for the graph's last launch to end; in pieces neither holds.
_IN_LINE_FROM = 4096
_MOST_TOKENS = 8192  # of a batch whose size is measured: larger shapes are for single long texts
_SMALL_RESULT = 128 * 1024  # bytes of results that are better copied when they are there than beside other batches
_TIMED_LENGTH = 16  # tokens of each text in the batches whose time is measured


def embedding_buckets(largest: int, max_rows: int, window: int, *, gpu: bool) -> list[Bucket]:
    """Compiled shapes up to `largest` tokens, of up to `max_rows` texts of up to `window` tokens.

    Shapes with few rows have the attention kernel for long sequences; where no text is long the other one serves best.
    """
    sizes = [size for size in (_GPU_SIZES if gpu else _CPU_SIZES) if size < largest]
    while sizes and 2 * sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    sizes.append(largest)
    buckets = [Bucket(size, min(max_rows, max(8, size // _SHORT)), False) for size in sizes]
    if gpu and window >= _LONG_FROM:
        buckets += [Bucket(size, min(max_rows, max(1, size // LONG)), False) for size in sizes if size >= _LONG_FROM]
    return sorted(set(buckets))


def timed_sizes(buckets: Iterable[Bucket]) -> dict[int, int]:
    """The sizes in tokens that a batch's budget may be, with the most rows of each. A model with a long window computes
    a little more per second in batches that take ten times as long as anyone wants to wait.
    """
    rows = {bucket.tokens: bucket.rows for bucket in sorted(buckets)}
    return {tokens: rows[tokens] for tokens in rows if tokens <= max(_MOST_TOKENS, min(rows))}


@dataclasses.dataclass(frozen=True)
class RunningBatch:
    """Embeddings or logits on their way to the host."""

    results: Any  # jax.Array, whose `is_ready` its type leaves out
    count: int
    bucket_tokens: int
    copies: DeviceCopies | None  # None: the copy is on its way already

    @property
    def done(self) -> bool:
        return self.results.is_ready()

    def read(self) -> np.ndarray:
        """float32 [sequences, the head's size]; waits for the device."""
        results = np.asarray(self.results) if self.copies is None else self.copies.to_host(self.results)
        return results[: self.count]


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
        for_few = getattr(module, "params_for_few", lambda *_: None)(params, model_config, backend)
        # A call also takes the time to hand over each array, so the smallest batches bring no more than they need.
        self._params = {b: params if for_few is None or b.tokens != FEW_TOKENS else for_few for b in buckets}
        self._token_types = token_types
        self._layouts = {b: _layout(b, token_types) for b in buckets}
        gpu = jax.default_backend() == "gpu"

        def cublas(bucket: Bucket) -> bool:
            return gpu and bucket.tokens >= _CUBLAS_FROM

        def run(params: Any, packed: jax.Array, bucket: Bucket) -> jax.Array:
            v = _layout(bucket, token_types).unpack(packed)
            inputs = StepInputs(
                token_ids=v["token_ids"],
                positions=v["positions"],
                query_starts=v["query_starts"],
                kv_lens=jnp.diff(v["query_starts"]),
                token_types=v.get("token_types"),
                backend=backend,
                epilogues=cublas(bucket),
            )
            hidden, _ = module.forward(params, inputs, None, model_config)
            return heads.apply(head, params, hidden, inputs)

        jitted = jax.jit(run, static_argnums=2)
        self._executables = compile_all(
            {b: functools.partial(jitted.lower, self._params[b], self._layouts[b].abstract, b) for b in buckets},
            "batches",
            store,
            progress,
            options=lambda b: _compiler_options(b, one_launch=self._params[b] is for_few) if gpu else {},
        )
        self._copies = DeviceCopies(jax.devices()[0].local_hardware_id) if gpu else None
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
        results = self._executables[bucket](self._params[bucket], buffer)
        copies = self._copies if results.nbytes <= _SMALL_RESULT else None
        if copies is None:
            results.copy_to_host_async()
        return RunningBatch(results, len(lengths), bucket.tokens, copies)

    def measure(self) -> list[CurvePoint]:
        """Seconds of full batches of each size, as `measure_curve` takes them."""
        rows = timed_sizes(self._executables)

        def timed(size: int, batches: int) -> float:
            count = min(rows[size], max(1, size // _TIMED_LENGTH))
            cuts = [size * i // count for i in range(count + 1)]
            texts = [
                Request(request_id="", prompt_token_ids=[0] * (end - begin)) for begin, end in itertools.pairwise(cuts)
            ]
            started = time.perf_counter()
            running = [self.dispatch(texts) for _ in range(batches)]
            running[-1].read()
            return time.perf_counter() - started

        return measure_curve(rows, timed)


def _compiler_options(bucket: Bucket, *, one_launch: bool) -> dict[str, Any]:
    """XLA's options for a batch on a GPU. one_launch: of all layers."""
    if one_launch:
        return {}
    graphs = IN_LINE if bucket.tokens >= _IN_LINE_FROM else IN_PIECES
    return {**graphs, **CUBLAS, **QUIET_TRIALS} if bucket.tokens >= _CUBLAS_FROM else {**graphs}


def _layout(bucket: Bucket, token_types: bool) -> Layout:
    tokens = ["token_ids", "positions", *(["token_types"] if token_types else [])]
    return Layout(
        (*((name, (bucket.tokens,), "int32") for name in tokens), ("query_starts", (bucket.rows + 1,), "int32"))
    )
