"""A device in numpy whose KV cache holds the tokens themselves: the next token is a hash of what a row's pages show.

Any page leaked into another sequence, lost, written too late or shared wrongly changes the text.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence as SequenceOf

import numpy as np

from pjengine.batch import Bucket, fill_forward, forward_layout, table_changes
from pjengine.engine import Engine, StepResult
from pjengine.engine_info import EngineInfo
from pjengine.kv_cache import CacheGroup, KVCacheManager, PageCopy
from pjengine.sampler import Variant
from pjengine.sampling_batch import SamplerKey, SamplingTable, sampler_layout
from pjengine.scheduler import Batch, Scheduler

VOCAB = 50
EOS = 0


def next_token(visible: SequenceOf[SequenceOf[int]], position: int, seed: int | None) -> int:
    """What the simulated model says after these visible tokens (one list per cache group)."""
    text = repr(([list(map(int, v)) for v in visible], position, seed)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") % VOCAB


def alone(prompt: list[int], max_tokens: int, windows: SequenceOf[int | None], seed: int | None = None) -> list[int]:
    """The output of a sequence that has the device to itself."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        last = len(tokens) - 1
        visible = [tokens if w is None else tokens[max(0, last - w + 1) :] for w in windows]
        tokens.append(next_token(visible, len(tokens), seed))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


@dataclasses.dataclass
class Done:
    tokens: np.ndarray
    bucket_tokens: int

    def read(self) -> StepResult:
        return StepResult(self.tokens, None, {})


class SimulatedRunner:
    def __init__(self, cache: KVCacheManager, slots: int):
        self.groups, self.page_size = cache.groups, cache.page_size
        self.pages = [np.full((g.num_pages, cache.page_size), -7) for g in cache.groups]
        self.max_pages = max(g.num_pages for g in cache.groups) * 4
        self.slots = slots
        self.tables = [np.zeros((slots + 1, self.max_pages), np.int32) for _ in cache.groups]
        self.sampling = SamplingTable(slots, frozenset())
        self.newest = np.full(slots + 1, -1)

    def dispatch(self, batch: Batch, copies: SequenceOf[PageCopy]) -> Done:
        for copy in copies:
            self.pages[copy.group][copy.target] = self.pages[copy.group][copy.source]
        rows = len(batch)
        bucket = Bucket(rows if batch.decode else batch.num_tokens + 3, rows + (0 if batch.decode else 2), batch.decode)
        layout = forward_layout(bucket, len(self.groups), self.page_size)
        room = layout.shape("changes_0")[0]
        changes = table_changes(batch, len(self.groups))
        v = layout.views(fill_forward(batch, bucket, layout, [found[:room] for found in changes], self.slots))
        for g, table in enumerate(self.tables):
            for slot, index, page in [*changes[g][room:], *v[f"changes_{g}"]]:
                if slot <= self.slots:
                    table[slot, index] = page
        key = SamplerKey(bucket.rows, Variant.PLAIN)
        for seq in batch.admitted:
            self.sampling.load(seq)
        s = sampler_layout(key).views(self.sampling.fill(batch, key, sampler_layout(key)))
        ends = v["query_starts"][1:]
        for r in np.flatnonzero(v["pending"]).tolist():
            v["token_ids"][ends[r] - 1] = self.newest[v["slots"][r]]
        for g, pages in enumerate(self.pages):
            for r in range(rows):
                table, end = self.tables[g][v["slots"][r]], v["kv_lens"][r]
                for at in range(v["query_starts"][r], ends[r]):
                    p = end - ends[r] + at
                    pages[table[p // self.page_size], p % self.page_size] = v["token_ids"][at]
        sampled = np.zeros(bucket.rows, np.int32)
        for r in range(rows):
            length = v["kv_lens"][r]
            visible = []
            for g, group in enumerate(self.groups):
                first = 0 if group.window is None else max(0, length - group.window)
                table = self.tables[g][v["slots"][r]]
                visible.append(
                    [self.pages[g][table[p // self.page_size], p % self.page_size] for p in range(first, length)]
                )
            seed = int(s["seeds"][r, 0]) | int(s["seeds"][r, 1]) << 32 if s["temperature"][r] else None
            sampled[r] = next_token(visible, int(length), seed)
            self.newest[s["slots"][r]] = sampled[r]
        return Done(sampled[:rows], bucket.tokens)


def make_engine(
    windows: SequenceOf[int | None],
    pages: int,
    page_size: int,
    slots: int,
    budget: int,
    prefix_caching: bool = True,
    step_sizes: SequenceOf[int] = (),
) -> Engine:
    cache = KVCacheManager([CacheGroup(pages, w) for w in windows], page_size, prefix_caching)
    info = EngineInfo("simulated", "generate", VOCAB, cache.capacity(budget), eos_token_ids=(EOS,))
    return Engine(info, Scheduler(cache, slots, budget, step_sizes), SimulatedRunner(cache, slots))
