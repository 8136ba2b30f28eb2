"""How a device's memory is divided: weights, temporaries of the largest step, and KV pages for the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pjengine.errors import OutOfMemory

GIB = 1 << 30
RESERVE = 256 << 20  # bytes of a GPU left to allocator rounding, counted with the temporaries
OUTSIDE = 7 << 28  # bytes of a GPU that CUDA takes for itself: its context, loaded kernels, graphs
# XLA's temporaries against `activation_width`: 0.2 to 0.7 for Llama-3.1-8B at 4096 and 8192 tokens on an H200, up to
# 3.4 in earlier forms of the step. The rest is room for models and devices whose fusions turn out otherwise; an engine
# whose executables need more plans again.
_SLACK = 2.0
_SAMPLER_COPIES = 4  # of the logits, in float32, alive at once in a sampler; 2 were measured


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

    @property
    def total(self) -> int:
        return self.weights + self.temporaries + self.tables + self.cache

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


def device_budget(memory: int, utilization: float | None) -> int:
    """Bytes of a device of `memory` that the engine may use: all but OUTSIDE, or the share that is asked for."""
    return int(memory * utilization) if utilization is not None else memory - OUTSIDE


def step_temporaries(*, tokens: int, rows: int, widths: int, hidden_size: int, vocab_size: int, itemsize: int) -> int:
    """Most bytes that a step needs beside weights, cache and tables: an estimate that the executables are held to.

    Args:
      tokens, rows: of the largest step.
      widths: elements per token alive at once in a layer, as `activation_width`.
    """
    logits = rows * vocab_size * 4
    forward = _SLACK * tokens * widths * itemsize
    # Two steps overlap: the outputs of one are alive while the next runs.
    outputs = 2 * (logits + tokens * hidden_size * itemsize)
    return int(max(forward, _SAMPLER_COPIES * logits)) + outputs + RESERVE


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
                f"({plan}); lower max_model_len, max_num_batched_tokens or max_num_seqs, raise "
                "gpu_memory_utilization (on a CPU: cpu_kv_bytes), or take a larger device"
            )
    return plan
