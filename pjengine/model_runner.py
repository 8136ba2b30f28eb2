"""Runs planned steps on the device: two executables per step, the forward pass and the sampler, neither waited for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.batch import (
    NOWHERE,
    Bucket,
    fill_forward,
    forward_layout,
    init_tables,
    table_changes,
    unpack_forward,
    write_tables,
)
from pjengine.device_cache import copy_pages, make_cache
from pjengine.engine import StepResult
from pjengine.executables import ExecutableStore, compile_all
from pjengine.kv_cache import PageCopy
from pjengine.logprobs import Logprobs, compute_logprobs
from pjengine.request import TokenLogprobs
from pjengine.sampler import SamplerState, init_state, sample, set_slot
from pjengine.samplers import Samplers
from pjengine.sampling_batch import (
    SamplerKey,
    SamplingTable,
    needs_state,
    sampler_layout,
    unpack_sampler,
    wants_prompt_logprobs,
)
from pjengine.scheduler import Batch
from pjengine.sequence import Sequence as Seq
from pjengine.step_inputs import KVCache

_CHANGES = 1024  # entries of block tables that one call writes outside of a step
_LOGPROB_CHUNK = 64  # prompt positions whose logits exist at once


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


def make_buckets(max_num_seqs: int, max_num_batched_tokens: int, first: int, growth: int) -> tuple[Bucket, ...]:
    """Decode buckets from `first` rows to `max_num_seqs`, mixed ones up to the token budget, each `growth` times the
    last.
    """
    rows = _ladder(first, max_num_seqs, growth)
    tokens = _ladder(min(32, max_num_batched_tokens), max_num_batched_tokens, growth)
    mixed = [Bucket(t, min(t, max_num_seqs), decode=False) for t in tokens]
    return (*(Bucket(r, r, decode=True) for r in rows), *mixed)


def _ladder(first: int, last: int, growth: int) -> list[int]:
    sizes = [min(first, last)]
    while sizes[-1] < last:
        sizes.append(min(sizes[-1] * growth, last))
    return sizes


def compiler_options(bucket: Bucket) -> dict[str, Any]:
    """XLA's options for a bucket. With some tens to hundreds of rows XLA prefers Triton products that leave several
    float32 sums for another kernel to add; cuBLAS's are faster than the two together (docs/decisions.md).
    """
    return {"xla_gpu_enable_triton_gemm": False} if 32 < bucket.tokens < 2048 else {}


@dataclasses.dataclass(frozen=True)
class RunningStep:
    """A dispatched step; its arrays are on their way to the host."""

    batch: Batch
    bucket_tokens: int
    tokens: jax.Array
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None

    def read(self) -> StepResult:
        rows = len(self.batch)
        tokens = np.asarray(self.tokens)[:rows]
        logprobs = None if self.logprobs is None else _to_host(self.logprobs, 0, rows)
        prompt: dict[int, list[TokenLogprobs]] = {}
        if self.prompt_logprobs is not None:
            at = 0
            for r in range(rows):
                row = self.batch.row(r)
                if wants_prompt_logprobs(row):
                    prompt[r] = _to_host(self.prompt_logprobs, at, at + row.size)
                at += row.size
        return StepResult(tokens, logprobs, prompt)


class ModelRunner:
    """Holds the parameters, the cache and the sampler's tables, and feeds them to executables in the order of the
    steps.
    """

    def __init__(
        self,
        module: ModuleType,
        model_config: Any,
        params: Any,
        cache_shapes: KVCache,
        shape: RunnerShape,
        eos: frozenset[int],
        store: ExecutableStore,
        progress: bool = True,
    ):
        self.shape = shape
        self.params = params
        self._jit_sample = jax.jit(_sample_step, donate_argnums=1, static_argnums=3)
        self._set_slot = jax.jit(set_slot, donate_argnums=0)
        self._prompt_logprobs = prompt_logprobs_function(module, model_config)
        self._write_tables = jax.jit(write_tables, donate_argnums=0)
        self._sampling = SamplingTable(shape.slots, eos)
        self._layouts = {b: forward_layout(b, shape.groups, shape.page_size) for b in shape.buckets}
        state = jax.eval_shape(lambda: init_state(shape.slots, shape.vocab_size))
        tables = jax.eval_shape(lambda: init_tables(shape.groups, shape.slots, shape.max_pages))
        jitted = forward_function(module, model_config, shape)
        self._forward = compile_all(
            {
                b: functools.partial(jitted.lower, params, cache_shapes, tables, state.tail, layout.abstract, b)
                for b, layout in self._layouts.items()
            },
            "forward steps",
            store,
            progress,
            compiler_options,
        )
        rows = {b.rows for b in shape.buckets}
        self._samplers = Samplers(self._lower_sampler, rows, shape.vocab_size, store, progress)
        self._cache = make_cache(cache_shapes)
        self.kv_bytes_per_token = (
            sum(x.dtype.itemsize * x.size // x.shape[0] for x in jax.tree.leaves(cache_shapes)) // shape.page_size
        )
        self._tables = init_tables(shape.groups, shape.slots, shape.max_pages)
        self._state: SamplerState = init_state(shape.slots, shape.vocab_size)

    def dispatch(self, batch: Batch, copies: Sequence[PageCopy]) -> RunningStep:
        """Starts a step and returns at once."""
        if copies:
            self._cache = copy_pages(self._cache, copies)
        for seq in batch.admitted:
            self._sampling.load(seq)
            if needs_state(seq):
                self._load_slot(seq)
        bucket = self.bucket_for(batch)
        packed = self._pack(batch, bucket)
        logits, hidden, self._cache, self._tables = self._forward[bucket](
            self.params, self._cache, self._tables, self._state.tail, packed
        )
        key, sampler = self._samplers.get(self._sampling.key(batch, bucket.rows))
        packed = self._sampling.fill(batch, key, sampler_layout(key))
        tokens, self._state = sampler(logits, self._state, packed)
        logprobs = None
        if self._sampling.wants_logprobs(batch):
            logprobs = self._samplers.logprobs(bucket.rows)(logits, tokens)
        prompt_logprobs = None
        if hidden is not None and _scores_prompts(batch):
            prompt_logprobs = self._prompt_logprobs(self.params, hidden, _next_tokens(batch, bucket))
        for array in jax.tree.leaves((tokens, logprobs, prompt_logprobs)):
            array.copy_to_host_async()
        return RunningStep(batch, bucket.tokens, tokens, logprobs, prompt_logprobs)

    def bucket_for(self, batch: Batch) -> Bucket:
        """The smallest compiled shape that holds the batch."""
        rows, tokens, decode = len(batch), batch.num_tokens, batch.decode
        fitting = (b for b in self.shape.buckets if b.rows >= rows and b.tokens >= tokens and (decode or not b.decode))
        return min(fitting, key=lambda b: (b.tokens, not b.decode))

    def _pack(self, batch: Batch, bucket: Bucket) -> np.ndarray:
        """The step's buffer. What it has no room for (prompts found in the prefix cache) goes to the tables now."""
        layout = self._layouts[bucket]
        room = layout.shape("changes_0")[0]
        changes = table_changes(batch, self.shape.groups)
        for at in range(room, max(map(len, changes)), _CHANGES):
            surplus = np.full((self.shape.groups, _CHANGES, 3), NOWHERE, np.int32)
            for g, found in enumerate(changes):
                part = found[at : at + _CHANGES]
                surplus[g, : len(part)] = part
            self._tables = self._write_tables(self._tables, list(surplus))
        return fill_forward(batch, bucket, layout, [found[:room] for found in changes], self.shape.slots)

    def settle(self) -> None:
        """Waits for samplers that are being compiled while others stand in for them."""
        self._samplers.settle()

    def _load_slot(self, seq: Seq) -> None:
        size = 64
        while size < len(seq.tokens):
            size *= 2
        tokens = np.zeros(size, np.int32)
        tokens[: len(seq.tokens)] = seq.tokens
        self._state = self._set_slot(self._state, seq.slot, tokens, len(seq.tokens), seq.prompt_len)

    def _lower_sampler(self, key: SamplerKey) -> Any:
        logits = jax.ShapeDtypeStruct((key.rows, self.shape.vocab_size), jnp.float32)
        state = jax.eval_shape(lambda: init_state(self.shape.slots, self.shape.vocab_size))
        return self._jit_sample.lower(logits, state, sampler_layout(key).abstract, key)


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

    return jax.jit(forward, donate_argnums=(1, 2), static_argnums=5)


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


def _next_tokens(batch: Batch, bucket: Bucket) -> np.ndarray:
    """int32 [tokens]: the known token after each of a step's positions; 0 where there is none."""
    targets = np.zeros(bucket.tokens, np.int32)
    at = 0
    for row in map(batch.row, range(len(batch))):
        known = row.seq.tokens[row.start + 1 : row.start + row.size + 1]
        targets[at : at + len(known)] = known
        at += row.size
    return targets


def _scores_prompts(batch: Batch) -> bool:
    return any(
        seq.params.prompt_logprobs is not None and wants_prompt_logprobs(batch.row(r))
        for r, seq in enumerate(batch.seqs)
    )


def _to_host(logprobs: Logprobs, start: int, end: int) -> list[TokenLogprobs]:
    token, rank, ids, top = (
        np.asarray(x)[start:end].tolist() for x in (logprobs.token, logprobs.rank, logprobs.top_ids, logprobs.top)
    )
    return [TokenLogprobs(t, r, list(zip(i, p, strict=True))) for t, r, i, p in zip(token, rank, ids, top, strict=True)]
