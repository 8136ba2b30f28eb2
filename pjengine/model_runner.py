"""Runs planned steps on the device: two executables per step, the forward pass and the sampler, neither waited for."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pjengine.batch import NOWHERE, Bucket, fill_forward, init_tables, table_changes, write_tables
from pjengine.device_cache import copy_pages, make_cache
from pjengine.engine import StepResult
from pjengine.errors import OutOfMemory
from pjengine.executables import Executables, ExecutableStore
from pjengine.kv_cache import PageCopy
from pjengine.logprobs import Logprobs
from pjengine.memory_plan import GIB
from pjengine.request import TokenLogprobs
from pjengine.sampler import SamplerState, init_state, set_slot
from pjengine.samplers import Samplers
from pjengine.sampling_batch import SamplingTable, needs_state, sampler_layout, wants_prompt_logprobs
from pjengine.scheduler import Batch
from pjengine.sequence import Sequence as Seq
from pjengine.step_programs import StepPrograms

logger = logging.getLogger(__name__)

_CHANGES = 1024  # entries of block tables that one call writes outside of a step


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
        programs: StepPrograms,
        executables: Executables,
        late: Callable[[], Executables],
        store: ExecutableStore,
        params: Any,
        eos: frozenset[int],
        room: int | None = None,
    ):
        """Puts the cache on the device.

        Args:
          executables: of `programs`; the first of them are ready.
          late: starts compiling its `late_works`.
          store: of samplers that are compiled when first needed.
          room: bytes that a step may need beside its arguments; buckets that need more are not used; None: no limit.
        Raises:
          OutOfMemory: no bucket for prompts is ready and needs no more.
        """
        shape = programs.shape
        self.executables = executables
        self._room = room
        self._ready: list[Bucket] = []
        self._keys = {bucket: [work.key for work in programs.works(bucket)] for bucket in programs.layouts}
        self._awaited = list(self._keys)
        self.programs = programs
        self._take_ready()
        self.params = params
        self._set_slot = jax.jit(set_slot, donate_argnums=0)
        self._write_tables = jax.jit(write_tables, donate_argnums=0)
        self._sampling = SamplingTable(shape.slots, eos)
        self._samplers = Samplers(programs.lower_sampler, executables, late, store)
        self._cache = make_cache(programs.cache)
        pages = jax.tree.leaves(programs.cache)
        self.kv_bytes_per_token = sum(x.dtype.itemsize * x.size // x.shape[0] for x in pages) // shape.page_size
        self._tables = init_tables(shape.groups, shape.slots, shape.max_pages)
        self._state: SamplerState = init_state(shape.slots, shape.vocab_size)

    @property
    def step_tokens(self) -> int:
        """Of the largest step that can be run now."""
        return max(b.tokens for b in self._ready if not b.decode)

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
        logits, hidden, self._cache, self._tables = self.executables[bucket].call(
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
            prompt_logprobs = self.programs.prompt_logprobs(self.params, hidden, _next_tokens(batch, bucket))
        for array in jax.tree.leaves((tokens, logprobs, prompt_logprobs)):
            array.copy_to_host_async()
        return RunningStep(batch, bucket.tokens, tokens, logprobs, prompt_logprobs)

    def bucket_for(self, batch: Batch) -> Bucket:
        """The smallest shape that holds the batch, of those that are compiled."""
        if self._awaited:
            self._take_ready()
        rows, tokens, decode = len(batch), batch.num_tokens, batch.decode
        return next(b for b in self._ready if b.rows >= rows and b.tokens >= tokens and (decode or not b.decode))

    def needed(self, bucket: Bucket) -> int:
        """Bytes that a step in this bucket, whose executables are ready, needs of the device beside its arguments."""
        return self.programs.needed(bucket, self.executables)

    def _take_ready(self) -> None:
        """Uses the buckets whose executables have become ready, if their steps fit into the memory set aside."""
        finished = self.executables.finished
        needed = {
            bucket: self.needed(bucket)
            for bucket in self._awaited
            if all(self.executables.get(key) for key in self._keys[bucket])
        }
        fitting = [b for b, size in needed.items() if self._room is None or size <= self._room]
        for bucket in needed.keys() - set(fitting):
            logger.warning("%s: needs %.2f GiB beside its arguments and is not used", bucket, needed[bucket] / GIB)
        self._awaited = [] if finished else [b for b in self._awaited if b not in needed]
        self._ready = sorted([*self._ready, *fitting], key=_cost)
        if all(b.decode for b in self._ready):
            sizes = ", ".join(f"{b}: {size / GIB:.2f} GiB" for b, size in sorted(needed.items()))
            raise OutOfMemory(
                f"max_num_batched_tokens: no step fits into the {(self._room or 0) / GIB:.2f} GiB set aside for "
                f"temporaries ({sizes}); lower max_num_batched_tokens or max_num_seqs"
            )

    def _pack(self, batch: Batch, bucket: Bucket) -> np.ndarray:
        """The step's buffer. What it has no room for (prompts found in the prefix cache) goes to the tables now."""
        layout = self.programs.layouts[bucket]
        room = layout.shape("changes_0")[0]
        changes = table_changes(batch, self.programs.shape.groups)
        for at in range(room, max(map(len, changes)), _CHANGES):
            surplus = np.full((self.programs.shape.groups, _CHANGES, 3), NOWHERE, np.int32)
            for g, found in enumerate(changes):
                part = found[at : at + _CHANGES]
                surplus[g, : len(part)] = part
            self._tables = self._write_tables(self._tables, list(surplus))
        return fill_forward(batch, bucket, layout, [found[:room] for found in changes], self.programs.shape.slots)

    def compile_late(self) -> None:
        """Has what few steps need compiled, while others run; without, it is compiled when first needed."""
        self._samplers.compile_late()

    def settle(self) -> None:
        """Waits for all that is being compiled, samplers too while others stand in for them."""
        self.executables.wait()
        self._samplers.settle()

    def _load_slot(self, seq: Seq) -> None:
        size = 64
        while size < len(seq.tokens):
            size *= 2
        tokens = np.zeros(size, np.int32)
        tokens[: len(seq.tokens)] = seq.tokens
        self._state = self._set_slot(self._state, seq.slot, tokens, len(seq.tokens), seq.prompt_len)


def _cost(bucket: Bucket) -> tuple[int, bool, int]:
    return bucket.tokens, not bucket.decode, bucket.rows


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
