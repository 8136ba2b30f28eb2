"""The sampler's executables: one that can do everything is compiled ahead of time, faster ones when first needed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from pjengine.executables import ExecutableStore, compile_all
from pjengine.logprobs import compute_logprobs
from pjengine.sampler import Variant
from pjengine.sampling_batch import SamplerKey

logger = logging.getLogger(__name__)

_WHAT = "samplers"


class Samplers:
    """`jax.stages.Compiled` samplers by key, and log-probabilities by row count.

    Args:
      lower: traces and lowers a sampler: returns a `jax.stages.Lowered`.
      rows: the row counts of the forward pass.
    """

    def __init__(
        self,
        lower: Callable[[SamplerKey], Any],
        rows: Collection[int],
        vocab_size: int,
        store: ExecutableStore,
        progress: bool = True,
    ):
        self._lower = lower
        self._store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sampler")
        self._coming: dict[SamplerKey, Future[Any]] = {}
        keys = [key for r in sorted(rows) for key in (SamplerKey(r, Variant.GREEDY), able(r))]
        lowerings: dict[SamplerKey | int, Callable[[], Any]] = {k: functools.partial(lower, k) for k in keys}
        lowerings |= {r: functools.partial(_lower_logprobs, r, vocab_size) for r in rows}
        compiled = compile_all(lowerings, _WHAT, store, progress)
        self._ready = {k: compiled[k] for k in keys}
        self._logprobs = {r: compiled[r] for r in rows}

    def logprobs(self, rows: int) -> Any:
        """Compiled `compute_logprobs` for this many rows."""
        return self._logprobs[rows]

    def get(self, key: SamplerKey) -> tuple[SamplerKey, Any]:
        """A sampler for the key, or while it is being compiled one for a larger key, which gives the same tokens.

        Only a key beyond `able` is waited for.
        """
        if key not in self._ready:
            coming = self._coming.get(key)
            if coming is None:
                logger.info("compiling a sampler for %s", key)
                coming = self._coming[key] = self._pool.submit(self._make, key)
            larger = [k for k in self._ready if k.covers(key)]
            if larger and not coming.done():
                key = min(larger)
            else:
                self._ready[key] = self._coming.pop(key).result()
        return key, self._ready[key]

    def settle(self) -> None:
        """Waits for what is being compiled: benchmarks time the samplers that will serve."""
        for key in list(self._coming):
            self._ready[key] = self._coming.pop(key).result()

    def _make(self, key: SamplerKey) -> Any:
        compiled = self._store.load(_WHAT, key)
        if compiled is None:
            compiled = self._lower(key).compile()
            self._store.keep(_WHAT, key, compiled)
        return compiled


def able(rows: int) -> SamplerKey:
    """The sampler that stands in for others: all a request can ask for, up to 256 adjusted tokens and 16 words."""
    return SamplerKey(rows, max(Variant), penalties=True, biases=256, bad_words=16)


def _lower_logprobs(rows: int, vocab_size: int) -> Any:
    logits = jax.ShapeDtypeStruct((rows, vocab_size), jnp.float32)
    return jax.jit(compute_logprobs).lower(logits, jax.ShapeDtypeStruct((rows,), jnp.int32))
