"""The programs of a generating engine: a forward pass for every bucket, a sampler for every number of rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pjengine.batch import Bucket, Layout, forward_layout, init_tables, unpack_forward
from pjengine.compilation import CUBLAS, QUIET_TRIALS, Work
from pjengine.executables import Executables
from pjengine.logprobs import Logprobs, compute_logprobs
from pjengine.sampler import SamplerState, init_state, sample
from pjengine.samplers import common_works, rare_works
from pjengine.sampling_batch import SamplerKey, sampler_layout, unpack_sampler
from pjengine.step_inputs import KVCache

_LOGPROB_CHUNK = 64  # prompt positions whose logits exist at once
DONATED = (1, 2)  # arguments of a forward step: cache, tables
_WAVE = 5  # forward steps: while they compile, the next ones are lowered
_PREFILL_ROWS = 64  # that steps with little else than prompts have at most
_COMPUTE_BOUND = 256  # tokens from which on a step's time grows with them: GEMMs no longer wait for weights


@dataclasses.dataclass(frozen=True)
class RunnerShape:
    """Everything static about a runner.

    Attributes:
      buckets: of the forward pass, decode and mixed.
      slots: sequences that run at once.
      max_pages: width of a block table.
      backend: of attention.
    """

    buckets: tuple[Bucket, ...]
    slots: int
    max_pages: int
    page_size: int
    groups: int
    vocab_size: int
    backend: str

    @property
    def step_sizes(self) -> list[int]:
        """Token counts of steps with prompts that waste nothing, where padding costs time."""
        return sorted({b.tokens for b in self.buckets if not b.decode and b.tokens >= _COMPUTE_BOUND})


def gpu_buckets(max_num_seqs: int, max_num_batched_tokens: int) -> tuple[Bucket, ...]:
    """Decode steps of few rows take as long as reading the weights; from 64 rows on they come in steps of 64, then 128.
    A single row is padded to two: XLA computes the norm of one row in two kernels, of several in one. Prompts are cut
    to the mixed sizes by the scheduler, so those need not be fine. The largest comes with few rows too: the head
    computes logits for every row of the shape, 0.8 ms of the 8B model's 91 for 512 rows.
    """
    rows = _sizes((2, 8, 32, 64, 128, 192, 256, 384, 512), max_num_seqs, growth=1.5)
    tokens = _sizes((64, 128, 256, 384, 512), max_num_batched_tokens, growth=2)
    few = Bucket(tokens[-1], _PREFILL_ROWS, decode=False)
    buckets = _buckets(rows, tokens, max_num_seqs)
    return (*buckets, few) if few.rows < buckets[-1].rows else buckets


def cpu_buckets(max_num_seqs: int, max_num_batched_tokens: int) -> tuple[Bucket, ...]:
    """Few, and none of one row: XLA multiplies that ten times slower than eight."""
    return _buckets(_sizes((8,), max_num_seqs, growth=8), _sizes((32,), max_num_batched_tokens, growth=8), max_num_seqs)


def _sizes(first: Sequence[int], last: int, growth: float) -> list[int]:
    """Those of `first` below `last`, then each `growth` times the one before, then `last`."""
    sizes = list(first)
    while sizes[-1] < last:
        sizes.append(int(sizes[-1] * growth))
    return [*(size for size in sizes if size < last), last]


def _buckets(rows: list[int], tokens: list[int], max_rows: int) -> tuple[Bucket, ...]:
    return (*(Bucket(r, r, decode=True) for r in rows), *(Bucket(t, min(t, max_rows), decode=False) for t in tokens))


class StepPrograms:
    """What a `ModelRunner` runs, and how it is compiled ahead of time.

    Args:
      module, config: the model.
      params, cache: trees of `jax.ShapeDtypeStruct`, or of arrays.
    """

    def __init__(self, module: ModuleType, config: Any, params: Any, cache: KVCache, shape: RunnerShape):
        self.shape = shape
        self.cache = cache
        self.layouts: dict[Bucket, Layout] = {
            bucket: forward_layout(bucket, shape.groups, shape.page_size) for bucket in shape.buckets
        }
        self.prompt_logprobs = prompt_logprobs_function(module, config)
        self._params = params
        self._state = jax.eval_shape(lambda: init_state(shape.slots, shape.vocab_size))
        self._tables = jax.eval_shape(lambda: init_tables(shape.groups, shape.slots, shape.max_pages))
        self.forward = forward_function(module, config, shape)
        self._sample = jax.jit(_sample_step, donate_argnums=1, static_argnums=3)

    def works(self, bucket: Bucket) -> list[Work]:
        """The executables without which no step is run in this bucket, the forward pass first."""
        options = compiler_options(bucket)
        wave = 1 if options else 0  # Triton's products first; `all_works` cuts the others into waves
        return [
            Work("forward steps", bucket, functools.partial(self.lower_forward, bucket), options, wave),
            *common_works(bucket.rows, self.lower_sampler),
        ]

    def late_works(self) -> list[Work]:
        """What few steps need: to be compiled while the engine serves already, for few rows first."""
        rows = sorted({bucket.rows for bucket in self.shape.buckets})
        return [work for r in rows for work in rare_works(r, self.shape.vocab_size, self.lower_sampler)]

    def all_works(self, count: int | None = None) -> list[Work]:
        """Those of the first `count` buckets (None: all), of which two can run any step.

        In the order in which they are lowered: forward steps first, as nothing else takes as long to lower and compile,
        and of those the ones with Triton's products, which XLA compiles by the dozen to time them.
        """
        mixed = sorted((b for b in self.shape.buckets if not b.decode), reverse=True)
        decode = sorted((b for b in self.shape.buckets if b.decode), reverse=True)
        wanted = [*mixed[:1], *decode[:1], *mixed[1:], *decode[1:]][:count]
        works = {work.key: work for bucket in wanted for work in self.works(bucket)}.values()
        triton, cublas, samplers = ([work for work in works if work.wave == wave] for wave in (0, 1, None))
        waves = [dataclasses.replace(work, wave=1 + i // _WAVE) for i, work in enumerate(cublas)]
        return [*triton, *waves, *samplers]

    def needed(self, bucket: Bucket, executables: Executables) -> int:
        """Bytes that a step in this bucket, whose executables are ready, needs of the device beside its arguments.

        What is compiled late is left out: its samplers need what `step_temporaries` has counted for them.
        """
        found = [executables[work.key] for work in self.works(bucket)]
        # Two steps overlap: the outputs of one are alive while the next runs.
        return max(e.temporaries for e in found) + 2 * found[0].outputs

    def lower_sampler(self, key: SamplerKey) -> Any:
        logits = jax.ShapeDtypeStruct((key.rows, self.shape.vocab_size), jnp.float32)
        return self._sample.lower(logits, self._state, sampler_layout(key).abstract, key)

    def lower_forward(self, bucket: Bucket) -> Any:
        return self.forward.lower(*self.abstract(bucket)[0], bucket)

    def abstract(self, bucket: Bucket) -> tuple[tuple[Any, ...], Any]:
        """Arguments of a forward step, and a tree like that of its results."""
        arguments = self._params, self.cache, self._tables, self._state.tail, self.layouts[bucket].abstract
        return arguments, (0, None if bucket.decode else 0, self.cache, self._tables)


def compiler_options(bucket: Bucket) -> Mapping[str, Any]:
    """XLA's options for a bucket. With some tens to hundreds of rows XLA prefers Triton products that leave several
    float32 sums for another kernel to add; cuBLAS's are faster than the two together (docs/decisions.md), nothing
    has to be compiled to time them, and theirs take residuals into their epilogues. Up to 128 rows products wait for
    memory, and what XLA does between its trials keeps their weights out of the L2 cache, as they are in a model.
    """
    if bucket.tokens <= 32:
        return {}
    return CUBLAS if bucket.tokens <= 128 else {**CUBLAS, **QUIET_TRIALS}


def forward_function(module: ModuleType, config: Any, shape: RunnerShape) -> Any:
    """The jitted forward pass: (params, cache, tables, tail, packed, bucket) -> (logits [rows, vocab], hidden or None,
    cache, tables). cache and tables are donated.
    """

    def forward(
        params: Any,
        cache: KVCache,
        tables: tuple[jax.Array, ...],
        tail: jax.Array,
        packed: jax.Array,
        bucket: Bucket,
    ) -> Any:
        layout = forward_layout(bucket, shape.groups, shape.page_size)
        inputs, tables = unpack_forward(packed, tail, tables, bucket, layout, shape.page_size, shape.backend)
        hidden, cache = module.forward(params, inputs, cache, config)
        logits = module.logits(params, hidden[inputs.last_tokens], config)
        return logits, None if bucket.decode else hidden, cache, tables

    return jax.jit(forward, donate_argnums=DONATED, static_argnums=5)


def prompt_logprobs_function(module: ModuleType, config: Any) -> Any:
    """The jitted (params, hidden [T, hidden_size], next tokens [T]) -> Logprobs of the next tokens."""

    def prompt_logprobs(params: Any, hidden: jax.Array, next_tokens: jax.Array) -> Logprobs:
        chunk = min(_LOGPROB_CHUNK, hidden.shape[0])
        chunks = -(-hidden.shape[0] // chunk)
        pad = chunks * chunk - hidden.shape[0]
        hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(chunks, chunk, -1)
        targets = jnp.pad(next_tokens, (0, pad)).reshape(chunks, chunk)
        found = jax.lax.map(lambda x: compute_logprobs(module.logits(params, x[0], config), x[1]), (hidden, targets))
        return jax.tree.map(lambda x: x.reshape(chunks * chunk, *x.shape[2:]), found)

    return jax.jit(prompt_logprobs)


def _sample_step(
    logits: jax.Array, state: SamplerState, packed: jax.Array, key: SamplerKey
) -> tuple[jax.Array, SamplerState]:
    return sample(logits, state, unpack_sampler(packed, sampler_layout(key)), key.variant, key.penalties)
