"""Counters of an engine, as plain numbers: the serving process turns them into Prometheus series."""

from __future__ import annotations

import msgspec


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot. Gauges describe now; the others only ever grow.

    Attributes:
      running, waiting: sequences (gauges).
      kv_usage: share of pages held by sequences, 0..1 (gauge).
      used_pages, total_pages: pages held by sequences, pages in all (gauges; summed over cache groups).
      cached_pages: free pages that still hold a reusable prefix (gauge).
      prefix_cache_queries, prefix_cache_hits: prompt tokens looked up, and found.
      preemptions: sequences whose pages were taken away.
      prompt_tokens: prompt tokens of admitted sequences. generation_tokens: tokens generated.
      batch_budget: tokens at which a batch of an embedding engine is full. knee_tokens, knee_seconds: where this device
        was found saturated with this model, and how long such a batch takes; 0: not measured (gauges).
      steps: device steps dispatched. step_tokens: tokens in them. padded_tokens: tokens of their buckets.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    used_pages: int = 0
    total_pages: int = 0
    cached_pages: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    batch_budget: int = 0
    knee_tokens: int = 0
    knee_seconds: float = 0.0
    steps: int = 0
    step_tokens: int = 0
    padded_tokens: int = 0
