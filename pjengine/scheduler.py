"""Which sequences compute how many tokens in the next step.

There is no prefill or decode phase: each step spends a token budget letting `computed` catch up with `known`, running
sequences first, in order of priority and arrival. Chunked prefill, prefix hits and recomputation after preemption are
all this
one rule.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import time
from typing import NamedTuple

from pjengine.kv_cache import KVCacheManager
from pjengine.sequence import Sequence, Status


class Row(NamedTuple):
    """One sequence's part of a step: tokens [start, start + size) are computed.

    `pending`: the last of them was sampled by an earlier step and is known only to the device.
    `samples`: the step's logits at the last token yield a new token. `position`: that token's place in its sequence.
    """

    seq: Sequence
    slot: int
    start: int
    size: int
    pending: bool
    samples: bool

    @property
    def position(self) -> int:
        return self.start + self.size


@dataclasses.dataclass(frozen=True)
class Batch:
    """The plan of one step. `admitted`: sequences that got their slot in it (its device state must be set first)."""

    rows: list[Row]
    admitted: list[Sequence]

    @property
    def num_tokens(self) -> int:
        return sum(row.size for row in self.rows)

    @property
    def decode(self) -> bool:
        return all(row.size == 1 for row in self.rows)


class Scheduler:
    """Owns the queues and, through the cache manager, the pages. Knows nothing of devices."""

    def __init__(self, cache: KVCacheManager, max_num_seqs: int, max_num_batched_tokens: int):
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Sequence] = []  # sorted by order
        self.preemptions = 0
        self.prompt_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        # Their prompts' pages are complete once the step just planned has run; siblings may copy them from the next
        # one on.
        self._prompts_done: list[Sequence] = []
        self._waiting: list[
            tuple[tuple[int, int, int], Sequence]
        ] = []  # heap; finished ones are dropped when they surface
        self._num_waiting = 0
        self._slots = list(range(max_num_seqs - 1, -1, -1))

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._num_waiting)

    def add(self, seq: Sequence) -> None:
        """Queues a sequence; a blocked one waits until its parent's prompt is computed."""
        self._num_waiting += 1
        if seq.parent is not None:
            seq.status = Status.BLOCKED
            seq.parent.children.append(seq)
        else:
            self._enqueue(seq)

    def finish(self, seq: Sequence) -> None:
        """Takes a sequence out, whatever its state, and frees its pages and slot."""
        if seq.status is Status.FINISHED:
            return
        if seq.status is Status.RUNNING:
            self._stop_running(seq)
        else:
            self._num_waiting -= 1
        seq.status = Status.FINISHED
        self._release_children(seq)

    def schedule(self) -> Batch | None:
        """Plans the next step and takes it as computed; None if there is nothing to compute now."""
        budget = self.max_num_batched_tokens
        rows: list[Row] = []
        preempted = False
        for parent in self._prompts_done:
            self._release_children(parent)
        self._prompts_done = []
        queue = list(self.running)
        for i, seq in enumerate(queue):
            if budget == 0:
                break
            if seq.status is not Status.RUNNING:
                continue  # preempted below for an earlier one
            seq.settled = seq.computed
            # A long prompt leaves each later sequence one token of the budget: nobody's decoding stalls behind it.
            count = min(seq.uncomputed, max(1, budget - (len(queue) - 1 - i)))
            if count == 0:
                continue
            while not self.cache.reserve(seq, seq.computed + count):
                victim = self.running[-1]
                self._preempt(victim)
                preempted = True
                if victim is seq:
                    break
            else:
                rows.append(self._advance(seq, count))
                budget -= count
        admitted = []
        while budget and not preempted and self._slots and (first := self._peek()) is not None:
            seq, count = first, self._admit(first, budget)
            if count == 0:
                break
            heapq.heappop(self._waiting)
            admitted.append(seq)
            rows.append(self._advance(seq, count))
            budget -= count
        return Batch(rows, admitted) if rows else None

    def check_integrity(self) -> None:
        """Raises RuntimeError if a page or slot leaked, is shared wrongly or is lost."""
        self.cache.check_integrity(self.running)
        slots = [s.slot for s in self.running] + self._slots
        if sorted(s for s in slots if s is not None) != list(range(self.max_num_seqs)):
            raise RuntimeError(f"scheduler: slots held or free are {slots}")
        if any(s.status is not Status.RUNNING or s.computed > s.known for s in self.running):
            raise RuntimeError("scheduler: a running sequence has a wrong status or more computed than known")
        if self.running != sorted(self.running, key=lambda s: s.order):
            raise RuntimeError("scheduler: running sequences are out of order")

    # -- parts -------------------------------------------------------------------------------------------------------

    def _enqueue(self, seq: Sequence) -> None:
        seq.status = Status.WAITING
        heapq.heappush(self._waiting, (seq.order, seq))

    def _peek(self) -> Sequence | None:
        while self._waiting and self._waiting[0][1].status is not Status.WAITING:
            heapq.heappop(self._waiting)
        seq = self._waiting[0][1] if self._waiting else None
        # A preempted sequence whose last token is still on its way cannot be recomputed yet.
        return None if seq is None or seq.pending else seq

    def _admit(self, seq: Sequence, budget: int) -> int:
        """Gives a waiting sequence pages and a slot; returns the tokens it computes in this step, 0 if it must wait."""
        parent = seq.parent
        forked = parent is not None and parent.settled >= seq.prompt_len and self.cache.fork(parent, seq)
        if not forked:
            self.cache.admit(seq)
        count = min(seq.known - seq.computed, budget)
        # Room for the whole of it, not only for this chunk: else admissions and preemptions would chase each other.
        pages = self.cache.pages_for(seq.known + 1) - self.cache.pages_for(seq.computed)
        enough = not self.running or self.cache.free_pages() >= pages
        cached = seq.computed
        if not enough or not self.cache.reserve(seq, cached + count):
            self.cache.free(seq)
            return 0
        if seq.first_scheduled is None:
            seq.first_scheduled = time.monotonic()
            seq.cached_tokens = cached
            self.prompt_tokens += seq.prompt_len
            self.prefix_queries += seq.prompt_len
            self.prefix_hits += cached
        seq.prefill_target = seq.known
        seq.slot = self._slots.pop()
        seq.status = Status.RUNNING
        seq.parent = None
        self._num_waiting -= 1
        bisect.insort(self.running, seq, key=lambda s: s.order)
        return count

    def _advance(self, seq: Sequence, count: int) -> Row:
        start = seq.computed
        end = start + count
        row = Row(
            seq=seq,
            slot=seq.slot if seq.slot is not None else -1,
            start=start,
            size=count,
            pending=end > len(seq.tokens),
            samples=end == seq.known,
        )
        seq.computed = end
        seq.pending += row.samples
        if end - seq.registered * self.cache.page_size >= self.cache.page_size:
            self.cache.register(seq)
        if seq.children and end >= seq.prompt_len:
            self._prompts_done.append(seq)
        return row

    def _preempt(self, seq: Sequence) -> None:
        """Takes the pages away; known tokens stay, and everything is computed again later."""
        self._stop_running(seq)
        self._num_waiting += 1
        self.preemptions += 1
        self._enqueue(seq)

    def _stop_running(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.cache.free(seq)
        seq.settled = 0
        if seq.slot is not None:
            self._slots.append(seq.slot)
            seq.slot = None

    def _release_children(self, seq: Sequence) -> None:
        """Lets the siblings of a prompt run: it is computed, or will not be."""
        for child in seq.children:
            if child.status is Status.BLOCKED:
                self._enqueue(child)
        seq.children = []
