"""What the scheduler counts of each running sequence, as columns: a step's plan is arithmetic on a few arrays."""

from __future__ import annotations

import numpy as np

from pjengine.sequence import Sequence


class SlotTable:
    """int32 columns, one entry per slot; entries of free slots mean nothing.

    Invariants of a held slot: `computed <= known`; the sequence's page tables cover positions [0, computed).

    Attributes:
      computed: tokens whose KV was written, or will be by a step already planned.
      settled: tokens computed by the steps before the one being planned: a page copy made for that one sees them.
      known: tokens whose value the host or the device knows.
      limit: most tokens the sequence may have, prompt and output.
      reserved: positions below this have pages that only this sequence writes.
      prompt_len: tokens of the prompt.
      watched: bool: more than a token may come of each of its steps (log-probabilities, stop tokens of its own).
    """

    def __init__(self, count: int):
        self.computed, self.settled, self.known, self.limit, self.reserved, self.prompt_len = np.zeros(
            (6, count), np.int32
        )
        self.watched = np.zeros(count, np.bool_)
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> list[int]:
        return self._free

    def take(self, seq: Sequence, computed: int, reserved: int) -> int:
        """A slot for a sequence that has pages up to `reserved` and needs not compute its first `computed` tokens."""
        slot = self._free.pop()
        params = seq.params
        self.computed[slot], self.settled[slot], self.reserved[slot] = computed, 0, reserved
        self.known[slot], self.limit[slot], self.prompt_len[slot] = len(seq.tokens), seq.max_total, seq.prompt_len
        self.watched[slot] = bool(params.stop_token_ids) or params.logprobs is not None
        return slot

    def release(self, slot: int) -> None:
        self._free.append(slot)
