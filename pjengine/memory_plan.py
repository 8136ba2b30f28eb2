"""How a device's memory is divided: weights, temporaries of the largest step, and KV pages for the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pjengine.errors import OutOfMemory

GIB = 1 << 30
RESERVE = 512 << 20  # bytes of a GPU left to allocator rounding, counted with the temporaries


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes, and the pages they buy. Pages include each group's null page.

    Attributes:
      budget: what the engine may use in all.
      weights, temporaries, tables: what is taken before the cache (`tables`: the sampler's).
      pages: of each cache group.
      cache: bytes of those pages.
    """

    budget: int
    weights: int
    temporaries: int
    tables: int
    pages: tuple[int, ...]
    cache: int

    def __str__(self) -> str:
        parts = {
            "budget": self.budget,
            "weights": self.weights,
            "temporaries": self.temporaries,
            "sampler tables": self.tables,
            "KV cache": self.cache,
        }
        sizes = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parts.items())
        return f"{sizes} ({' + '.join(map(str, self.pages))} pages)"


def plan_memory(
    *,
    budget: int,
    weights: int,
    temporaries: int,
    tables: int,
    page_bytes: Sequence[int],
    windows: Sequence[int | None],
    page_size: int,
    max_num_seqs: int,
    step_tokens: int,
    sequence_tokens: int,
) -> MemoryPlan:
    """Gives groups with a window what all their sequences can ever hold, at most their share, and the others the rest.

    Args:
      page_bytes, windows: of each cache group.
      sequence_tokens: the longest sequence that must fit when alone.
    Raises:
      OutOfMemory: one such sequence does not fit; the message holds the numbers.
    """
    left = budget - weights - temporaries - tables
    total_page = sum(page_bytes)
    even = max(0, left) // total_page  # pages if every group got as many
    pages = [even] * len(page_bytes)
    for group, window in enumerate(windows):
        if window is not None and any(w is None for w in windows):
            most = 1 + max_num_seqs * (-(-window // page_size) + 2) + -(-step_tokens // page_size)
            pages[group] = min(even, most)
    fixed = sum(p * b for p, b, w in zip(pages, page_bytes, windows, strict=True) if w is not None)
    full = [g for g, w in enumerate(windows) if w is None]
    for group in full:
        pages[group] = max(0, left - fixed) // sum(page_bytes[g] for g in full)
    plan = MemoryPlan(
        budget, weights, temporaries, tables, tuple(pages), sum(p * b for p, b in zip(pages, page_bytes, strict=True))
    )
    for group, window in enumerate(windows):
        tokens = sequence_tokens if window is None else min(sequence_tokens, window + step_tokens + page_size)
        needed = 1 + -(-tokens // page_size)
        if pages[group] < needed:
            raise OutOfMemory(
                f"max_model_len: a sequence of {sequence_tokens} tokens needs "
                f"{needed * page_bytes[group] / GIB:.3f} GiB of KV cache, {max(0, left) / GIB:.3f} GiB are left "
                f"({plan}); lower max_model_len or max_num_batched_tokens, or raise gpu_memory_utilization "
                "(on a CPU: cpu_kv_bytes)"
            )
    return plan
