"""The sampler's executables: those that most requests need are compiled before the engine serves, one that can do
everything soon after, faster ones when they are often needed."""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from pjengine.compilation import Work
from pjengine.executables import Executable, Executables, ExecutableStore
from pjengine.logprobs import compute_logprobs
from pjengine.sampler import Variant
from pjengine.sampling_batch import SamplerKey

logger = logging.getLogger(__name__)

_WHAT = "samplers"
_OFTEN = 50  # steps, after which compiling is worth its while: not for a short text, nor for a size passed through once


class Samplers:
    """`jax.stages.Compiled` samplers by key, and log-probabilities by row count.

    Args:
      lower: traces and lowers a sampler: returns a `jax.stages.Lowered`.
      executables: of `common_works`, those of the row counts that are asked for ready.
      late: starts compiling `rare_works`; called when one of them is needed, or by `compile_late`.
      store: of the others.
    """

    def __init__(
        self,
        lower: Callable[[SamplerKey], Any],
        executables: Executables,
        late: Callable[[], Executables],
        store: ExecutableStore,
    ):
        self._lower = lower
        self._executables = executables
        self._start_late = late
        self._late: Executables | None = None
        self._store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sampler")
        self._coming: dict[SamplerKey, Future[Any]] = {}
        self._asked: Counter[SamplerKey] = Counter()
        self._ready: dict[SamplerKey, Any] = {}

    def compile_late(self) -> Executables:
        """Has what few steps need compiled, while others run."""
        if self._late is None:
            self._late = self._start_late()
            weakref.finalize(self, self._late.cancel)  # nobody needs what an engine that is gone would have had
        return self._late

    def logprobs(self, rows: int) -> Any:
        """Compiled `compute_logprobs` for this many rows, once it is ready."""
        return self.compile_late()[rows].call

    def get(self, key: SamplerKey) -> tuple[SamplerKey, Any]:
        """A sampler for the key, or until it is compiled one for a larger key, which gives the same tokens.

        Compiling starts when a key has been asked for often; only one beyond `able` is waited for, and `able` itself
        where it is not there yet.
        """
        if key not in self._ready and (found := self._executables.get(key)) is not None:
            self._ready[key] = found.call
        if key not in self._ready:
            self._asked[key] += 1
            larger = min((k for k in self._ready if k.covers(key)), default=None)
            if larger is None and able(key.rows).covers(key):
                larger = able(key.rows)
                self._ready[larger] = self.compile_late()[larger].call
            if larger is None or self._asked[key] >= _OFTEN:
                self._start(key)
            if larger is not None and (key not in self._coming or not self._coming[key].done()):
                return larger, self._ready[larger]
            self._finish(key)
        return key, self._ready[key]

    def settle(self) -> None:
        """Compiles what has been asked for and waits: benchmarks time the samplers that will serve."""
        if self._late is not None:
            self._late.wait()
        for key in self._asked:
            self._start(key)
        for key in list(self._coming):
            self._finish(key)

    def _start(self, key: SamplerKey) -> None:
        if key not in self._ready and key not in self._coming:
            logger.info("compiling a sampler for %s", key)
            self._coming[key] = self._pool.submit(self._make, key)

    def _finish(self, key: SamplerKey) -> None:
        self._ready[key] = self._coming.pop(key).result()

    def _make(self, key: SamplerKey) -> Any:
        made = self._store.load(_WHAT, key)
        if made is None:
            made = Executable.of(self._lower(key).compile())
            self._store.keep(_WHAT, key, made)
        return made.call


def able(rows: int) -> SamplerKey:
    """The sampler that stands in for others: all a request can ask for, up to 256 adjusted tokens and 16 words."""
    return SamplerKey(rows, max(Variant), penalties=True, biases=256, bad_words=16)


def common_works(rows: int, lower: Callable[[SamplerKey], Any]) -> list[Work]:
    """What is compiled before steps of this many rows can run: samplers for a temperature alone."""
    keys = (SamplerKey(rows, Variant.PLAIN), SamplerKey(rows, Variant.GREEDY))
    return [Work(_WHAT, key, functools.partial(lower, key)) for key in keys]


def rare_works(rows: int, vocab_size: int, lower: Callable[[SamplerKey], Any]) -> list[Work]:
    """What is compiled next for steps of this many rows: the sampler that can do everything and, with `rows` for a key,
    log-probabilities. Both take far longer to compile than those of `common_works`.
    """
    logprobs = Work(_WHAT, rows, functools.partial(_lower_logprobs, rows, vocab_size))
    return [Work(_WHAT, able(rows), functools.partial(lower, able(rows))), logprobs]


def _lower_logprobs(rows: int, vocab_size: int) -> Any:
    logits = jax.ShapeDtypeStruct((rows, vocab_size), jnp.float32)
    return jax.jit(compute_logprobs).lower(logits, jax.ShapeDtypeStruct((rows,), jnp.int32))
