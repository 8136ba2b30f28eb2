"""Which sequences compute how many tokens in the next step.

There is no prefill or decode phase: each step spends a token budget letting `computed` catch up with `known`, running
sequences first, in order of priority and arrival. Chunked prefill, prefix hits and recomputation after preemption are
all this one rule.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import time
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pjengine.kv_cache import KVCacheManager
from pjengine.sequence import Sequence, Status
from pjengine.slots import SlotTable


class Row(NamedTuple):
    """One sequence's part of a step: tokens [start, start + size) are computed. The fields are those of `Batch`."""

    seq: Sequence
    slot: int
    start: int
    size: int

    @property
    def position(self) -> int:
        """Place in its sequence of the token that the row samples, if it does."""
        return self.start + self.size


@dataclasses.dataclass(frozen=True)
class Batch:
    """The plan of one step: a row per sequence, as columns.

    Attributes:
      seqs: of each row.
      slots, starts, counts: int32 [rows]; row r computes tokens [starts[r], starts[r] + counts[r]) of its sequence.
      pending: bool [rows]: the last of them was sampled by the step before and may be known only to the device.
      samples: bool [rows]: the step's logits at the last token yield a new token.
      watched: bool [rows]: that token is the sequence's first or last, or may end it or carry more than itself.
      admitted: sequences that got their slot in this step (its device state must be set first).
      grown: (sequence, index): its page tables changed from that page on. Those of admitted sequences are among them.
    """

    seqs: list[Sequence]
    slots: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    pending: np.ndarray
    samples: np.ndarray
    watched: np.ndarray
    admitted: list[Sequence]
    grown: list[tuple[Sequence, int]]

    def __len__(self) -> int:
        return len(self.seqs)

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def decode(self) -> bool:
        return bool(self.counts.max() == 1)

    def row(self, index: int) -> Row:
        return Row(self.seqs[index], int(self.slots[index]), int(self.starts[index]), int(self.counts[index]))


class Scheduler:
    """Owns the queues and, through the cache manager, the pages. Knows nothing of devices."""

    def __init__(
        self, cache: KVCacheManager, max_num_seqs: int, max_num_batched_tokens: int, step_sizes: Iterable[int] = ()
    ):
        """step_sizes: token counts that a step with prompts costs no padding at; see `_trim`. None need be given."""
        self.cache = cache
        self._step_sizes = sorted(step_sizes)
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
        self._table = SlotTable(max_num_seqs)

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
        for parent in self._prompts_done:
            self._release_children(parent)
        self._prompts_done = []
        table, budget = self._table, self.max_num_batched_tokens
        slots = _int32([seq.slot for seq in self.running])
        starts, known = table.computed[slots], table.known[slots]
        table.settled[slots] = starts
        counts = _share(np.where(known < table.limit[slots], known - starts, 0), budget)
        grown = self._reserve(slots, starts, counts)
        kept = len(self.running)
        seqs = list(self.running)
        admitted: list[Sequence] = []
        if kept == len(slots):  # whoever was preempted goes first
            admitted, sizes = self._admit_waiting(budget - int(counts.sum()))
            grown += [(seq, 0) for seq in admitted]
            seqs += admitted
            new = _int32([seq.slot for seq in admitted])
            slots, counts = np.append(slots, new), np.append(counts, _int32(sizes))
            starts = np.append(starts, table.computed[new])
        slots, starts, counts = slots[: len(seqs)], starts[: len(seqs)], counts[: len(seqs)]
        if not counts.all():
            rows = np.flatnonzero(counts)
            slots, starts, counts = slots[rows], starts[rows], counts[rows]
            seqs = [seqs[r] for r in rows.tolist()]
        if not seqs:
            return None
        _trim(counts, self._step_sizes)
        return self._advance(seqs, slots, starts, counts, admitted, grown)

    def check_integrity(self) -> None:
        """Raises RuntimeError if a page or slot leaked, is shared wrongly or is lost."""
        self.cache.check_integrity(self.running)
        slots = [s.slot for s in self.running] + self._table.free
        if sorted(s for s in slots if s is not None) != list(range(self.max_num_seqs)):
            raise RuntimeError(f"scheduler: slots held or free are {slots}")
        held = _int32([s.slot for s in self.running])
        if any(s.status is not Status.RUNNING for s in self.running) or np.any(
            self._table.computed[held] > self._table.known[held]
        ):
            raise RuntimeError("scheduler: a running sequence has a wrong status or more computed than known")
        if self.running != sorted(self.running, key=_order):
            raise RuntimeError("scheduler: running sequences are out of order")

    # -- parts of a step ---------------------------------------------------------------------------------------------

    def _reserve(self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> list[tuple[Sequence, int]]:
        """Pages for what the running sequences compute; whoever comes last gives way. Returns those that got some, as
        `Batch.grown`.
        """
        grown = []
        ends = starts + counts
        for i in np.flatnonzero((counts > 0) & (ends > self._table.reserved[slots])).tolist():
            if i >= len(self.running):
                break  # preempted for an earlier one, with all behind it
            seq, start, end = self.running[i], int(starts[i]), int(ends[i])
            while not self.cache.reserve(seq, start, end):
                victim = self.running[-1]
                self._preempt(victim)
                if victim is seq:
                    break
            else:
                self._table.reserved[slots[i]] = self.cache.pages_for(end) * self.cache.page_size
                grown.append((seq, start // self.cache.page_size))
        return grown

    def _admit_waiting(self, budget: int) -> tuple[list[Sequence], list[int]]:
        """Sequences that start now, and how many tokens each computes."""
        admitted: list[Sequence] = []
        counts: list[int] = []
        while budget and self._table.free and (seq := self._peek()) is not None:
            count = self._admit(seq, budget)
            if count == 0:
                break
            heapq.heappop(self._waiting)
            admitted.append(seq)
            counts.append(count)
            budget -= count
        return admitted, counts

    def _admit(self, seq: Sequence, budget: int) -> int:
        """Gives a waiting sequence pages and a slot; returns the tokens it computes in this step, 0 if it must wait."""
        cached = self._fork(seq)
        if cached is None:
            cached = self.cache.admit(seq)
        known = len(seq.tokens)
        count = min(known - cached, budget)
        # Room for the whole of it, not only for this chunk: else admissions and preemptions would chase each other.
        pages = self.cache.pages_for(known + 1) - self.cache.pages_for(cached)
        enough = not self.running or self.cache.free_pages() >= pages
        if not enough or not self.cache.reserve(seq, cached, cached + count):
            self.cache.free(seq)
            return 0
        if seq.first_scheduled is None:
            seq.first_scheduled = time.monotonic()
            seq.cached_tokens = cached
            self.prompt_tokens += seq.prompt_len
            self.prefix_queries += seq.prompt_len
            self.prefix_hits += cached
        seq.slot = self._table.take(seq, cached, self.cache.pages_for(cached + count) * self.cache.page_size)
        seq.status = Status.RUNNING
        seq.parent = None
        self._num_waiting -= 1
        bisect.insort(self.running, seq, key=_order)
        return count

    def _fork(self, seq: Sequence) -> int | None:
        """Gives a sibling the pages of its parent's prompt; returns the tokens they hold, None if there are none."""
        parent = seq.parent
        if parent is None or parent.slot is None or self._table.settled[parent.slot] < seq.prompt_len:
            return None
        if not self.cache.fork(parent, seq):
            return None
        self._table.reserved[parent.slot] = 0  # what it writes next may be shared now
        return seq.prompt_len - 1

    def _advance(
        self,
        seqs: list[Sequence],
        slots: np.ndarray,
        starts: np.ndarray,
        counts: np.ndarray,
        admitted: list[Sequence],
        grown: list[tuple[Sequence, int]],
    ) -> Batch:
        """Takes the rows as computed."""
        table, page_size = self._table, self.cache.page_size
        ends = starts + counts
        samples = ends == table.known[slots]
        table.computed[slots] = ends
        table.known[slots] += samples
        prompts = table.prompt_len[slots]
        for r in np.flatnonzero((starts < prompts) & (ends >= prompts)).tolist():
            if seqs[r].children:
                self._prompts_done.append(seqs[r])
        # A page is offered with the token that fills it or, if the host does not know that one yet, with the next.
        for r in np.flatnonzero(ends // page_size > (starts - 1) // page_size).tolist():
            self.cache.register(seqs[r], int(ends[r]))
        return Batch(
            seqs=seqs,
            slots=slots,
            starts=starts,
            counts=counts,
            pending=ends > _int32([len(seq.tokens) for seq in seqs]),
            samples=samples,
            watched=table.watched[slots] | (ends == prompts) | (ends + 1 >= table.limit[slots]),
            admitted=admitted,
            grown=grown,
        )

    # -- queues ------------------------------------------------------------------------------------------------------

    def _enqueue(self, seq: Sequence) -> None:
        seq.status = Status.WAITING
        heapq.heappush(self._waiting, (seq.order, seq))

    def _peek(self) -> Sequence | None:
        while self._waiting and self._waiting[0][1].status is not Status.WAITING:
            heapq.heappop(self._waiting)
        seq = self._waiting[0][1] if self._waiting else None
        # A preempted sequence whose last token is still on its way cannot be recomputed yet.
        return None if seq is None or len(seq.tokens) < seq.awaited else seq

    def _preempt(self, seq: Sequence) -> None:
        """Takes the pages away; known tokens stay, and everything is computed again later."""
        seq.awaited = int(self._table.known[seq.slot])
        self._stop_running(seq)
        self._num_waiting += 1
        self.preemptions += 1
        self._enqueue(seq)

    def _stop_running(self, seq: Sequence) -> None:
        del self.running[bisect.bisect_left(self.running, seq.order, key=_order)]
        self.cache.free(seq)
        if seq.slot is not None:
            self._table.release(seq.slot)
            seq.slot = None

    def _release_children(self, seq: Sequence) -> None:
        """Lets the siblings of a prompt run: it is computed, or will not be."""
        for child in seq.children:
            if child.status is Status.BLOCKED:
                self._enqueue(child)
        seq.children = []


def _share(uncomputed: np.ndarray, budget: int) -> np.ndarray:
    """int32 tokens that each running sequence computes: one each as far as the budget goes, so that nobody's decoding
    stalls behind a long prompt, and what is left to the prompts in order.
    """
    counts = np.minimum(uncomputed, 1)
    left = budget - int(counts.sum())
    if left < 0:
        counts[np.cumsum(counts) > budget] = 0
        return counts
    for i in np.flatnonzero(uncomputed > 1).tolist():
        more = min(left, int(uncomputed[i]) - 1)
        counts[i] += more
        left -= more
    return counts


def _trim(counts: np.ndarray, sizes: list[int]) -> None:
    """Shortens the last prompts' chunks to the next lower of the sizes, in place: the tokens of a chunk can wait for
    the next step, padding is computed for nothing. Every row keeps a token.
    """
    surplus = int(counts.sum()) - next((s for s in reversed(sizes) if s <= counts.sum()), 0)
    if surplus >= counts.sum() - len(counts):
        return
    for r in np.flatnonzero(counts > 1)[::-1].tolist():
        cut = min(surplus, int(counts[r]) - 1)
        counts[r] -= cut
        surplus -= cut


def _order(seq: Sequence) -> tuple[int, int, int]:
    return seq.order


def _int32(values: list[int | None] | list[int]) -> np.ndarray:
    return np.array(values, np.int32)
