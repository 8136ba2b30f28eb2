"""Sequence: one continuation of a request, as the engine sees it."""

from __future__ import annotations

import dataclasses
import enum
import time

from pjengine.request import Request, TokenLogprobs
from pjengine.sampling_params import SamplingParams


class Status(enum.Enum):
    BLOCKED = "waits for its sibling's prompt"  # n > 1: pages are forked, not computed again
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False)
class Sequence:
    """Tokens known against tokens computed; every step lets the second catch up with the first.

    Invariants: `computed <= known`; a running sequence has a slot; `tables[g]` covers positions [0, computed) of group
    g, with NULL_PAGE where a window has moved on.
    """

    request: Request
    params: SamplingParams
    index: int
    order: tuple[int, int, int]  # (priority, arrival number, index): lower runs first, higher is preempted first
    max_total: int  # most tokens, prompt and output
    seed: int
    arrival: float
    tokens: list[int] = dataclasses.field(init=False)
    computed: int = 0  # tokens whose KV was written, or will be by a step already dispatched
    settled: int = (
        0  # tokens computed by the steps before the one being planned: a page copy made for that one sees them
    )
    pending: int = 0  # tokens sampled by dispatched steps whose values the host has not read yet
    slot: int | None = None
    status: Status = Status.WAITING
    tables: list[list[int]] = dataclasses.field(default_factory=list)
    page_hashes: list[bytes] = dataclasses.field(default_factory=list)
    table_changed: bool = False  # since the device's copy of the tables was last brought up to date
    reserved: int = 0  # positions below this have pages that only this sequence writes
    registered: int = 0  # leading full pages offered to the prefix cache
    prefill_target: int = 0  # known tokens at admission: a prefill (or recompute) lasts up to here
    cached_tokens: int = 0
    first_scheduled: float | None = None
    first_token: float | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    parent: Sequence | None = None
    children: list[Sequence] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def known(self) -> int:
        """Tokens whose value the host or the device knows."""
        return len(self.tokens) + self.pending

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def uncomputed(self) -> int:
        """Tokens a step could compute now: none once the last one allowed is sampled."""
        known = len(self.tokens) + self.pending
        return 0 if known >= self.max_total else known - self.computed

    def seconds(self) -> float:
        """Since arrival."""
        return time.monotonic() - self.arrival
