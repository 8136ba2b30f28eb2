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
    """What it is and holds. How far it is computed stands in the scheduler's `SlotTable` while it runs.

    Invariants: a running sequence has a slot; `tables[g]` covers the positions computed so far of group g, with
    NULL_PAGE where a window has moved on.
    """

    request: Request
    params: SamplingParams
    index: int
    order: tuple[int, int, int]  # (priority, arrival number, index): lower runs first, higher is preempted first
    max_total: int  # most tokens, prompt and output
    seed: int
    arrival: float
    tokens: list[int] = dataclasses.field(init=False)
    awaited: int = 0  # tokens it has once every dispatched step is read; set when it is preempted
    slot: int | None = None
    status: Status = Status.WAITING
    tables: list[list[int]] = dataclasses.field(default_factory=list)
    page_hashes: list[bytes] = dataclasses.field(default_factory=list)
    registered: int = 0  # leading full pages offered to the prefix cache
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
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    def seconds(self) -> float:
        """Since arrival."""
        return time.monotonic() - self.arrival
