"""Which pages each sequence holds, over all cache groups: prefix reuse, growth, copy-on-write, window trimming."""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Iterable

from pjengine.block_pool import NULL_PAGE, BlockPool
from pjengine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class CacheGroup:
    """Layers that share block tables. `window`: how far back their queries see, in tokens; None: everything."""

    num_pages: int
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class PageCopy:
    """A page to copy on the device, in every layer of a group, before the next step."""

    group: int
    source: int
    target: int


class KVCacheManager:
    """Host side of the paged cache. The device side follows: steps are dispatched in the order they are planned here,
    so a page may be handed out anew while an earlier step that reads it is still running."""

    def __init__(self, groups: Iterable[CacheGroup], page_size: int, prefix_caching: bool):
        self.groups = tuple(groups)
        self.pools = tuple(BlockPool(g.num_pages) for g in self.groups)
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.copies: list[PageCopy] = []

    def capacity(self, step_tokens: int) -> int:
        """Longest sequence (tokens) that fits when it is alone, computing at most `step_tokens` a step."""
        tokens = []
        for group in self.groups:
            usable = (group.num_pages - 1) * self.page_size
            if group.window is None or usable < group.window + step_tokens + 2 * self.page_size:
                tokens.append(usable)
        return min(tokens, default=2**31 - 1)

    def free_pages(self) -> int:
        """Pages free in the group that has fewest."""
        return min((pool.num_free for pool in self.pools), default=2**31 - 1)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    # -- a sequence's life -------------------------------------------------------------------------------------------

    def admit(self, seq: Sequence) -> int:
        """Empty tables, or those of the longest cached prefix of its tokens (at least one is left to compute).

        Returns: tokens of that prefix.
        """
        seq.tables = [[] for _ in self.groups]
        seq.registered = 0
        if not self.prefix_caching or seq.params.prompt_logprobs is not None:
            return 0
        hashes = self._hashes(seq)[: (len(seq.tokens) - 1) // self.page_size]
        length = self._longest_prefix(hashes)
        for table, group, pool in zip(seq.tables, self.groups, self.pools, strict=True):
            first = self._first_visible_page(group, length * self.page_size)
            for i, page_hash in enumerate(hashes[:length]):
                page = pool.lookup(page_hash) if i >= first else NULL_PAGE
                assert page is not None
                if page != NULL_PAGE:
                    pool.retain(page)
                table.append(page)
        seq.registered = length
        return length * self.page_size

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Shares the pages of the parent's prompt; the child computes only the prompt's last token again. False if the
        parent's windows have already moved on."""
        computed = child.prompt_len - 1
        count = self.pages_for(child.prompt_len)
        tables = [table[:count] for table in parent.tables]
        for table, group in zip(tables, self.groups, strict=True):
            first = self._first_visible_page(group, computed)
            if len(table) < count or NULL_PAGE in table[first:]:
                return False
        for table, pool in zip(tables, self.pools, strict=True):
            for page in table:
                if page != NULL_PAGE:
                    pool.retain(page)
        child.tables = tables
        child.page_hashes = parent.page_hashes[: computed // self.page_size]
        child.registered = len(child.page_hashes)
        return True

    def reserve(self, seq: Sequence, computed: int, upto: int) -> bool:
        """Pages of its own for positions [computed, upto), in every group or in none. False: not enough are free."""
        for group, pool, table in zip(self.groups, self.pools, seq.tables, strict=True):
            self._trim(group, pool, table, computed)
        first, end = computed // self.page_size, self.pages_for(upto)
        shared = [
            [i for i in range(first, min(end, len(table))) if not pool.writable(table[i])]
            for pool, table in zip(self.pools, seq.tables, strict=True)
        ]
        for pool, table, copied in zip(self.pools, seq.tables, shared, strict=True):
            if pool.num_free < len(copied) + max(0, end - len(table)):
                return False
        for g, (pool, table, copied) in enumerate(zip(self.pools, seq.tables, shared, strict=True)):
            for i in copied:
                page = pool.allocate()
                self.copies.append(PageCopy(g, table[i], page))
                pool.release(table[i])
                table[i] = page
            table.extend(pool.allocate() for _ in range(end - len(table)))
        return True

    def register(self, seq: Sequence, computed: int) -> None:
        """Offers pages that are full, computed and of known tokens to the prefix cache."""
        if not self.prefix_caching:
            return
        full = min(computed, len(seq.tokens)) // self.page_size
        if full <= seq.registered:
            return
        hashes = self._hashes(seq)
        for i in range(seq.registered, full):
            for pool, table in zip(self.pools, seq.tables, strict=True):
                if table[i] != NULL_PAGE:
                    pool.register(table[i], hashes[i])
        seq.registered = full

    def forget(self) -> None:
        """Nothing that was offered is found again: steps that should have written it have not."""
        for pool in self.pools:
            pool.forget()

    def free(self, seq: Sequence) -> None:
        """Lets go of every page, the last first: a prefix's head stays reusable longest."""
        for pool, table in zip(self.pools, seq.tables, strict=True):
            for page in reversed(table):
                if page != NULL_PAGE:
                    pool.release(page)
        seq.tables = []
        seq.registered = 0

    def take_copies(self) -> list[PageCopy]:
        copies, self.copies = self.copies, []
        return copies

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises RuntimeError unless these sequences explain every page that is held."""
        held = list(sequences)
        for g, pool in enumerate(self.pools):
            pool.check_integrity(p for s in held if s.tables for p in s.tables[g] if p != NULL_PAGE)

    # -- prefix hashes -----------------------------------------------------------------------------------------------

    def _hashes(self, seq: Sequence) -> list[bytes]:
        """Hash of everything up to the end of each full page of known tokens, chained and salted."""
        hashes, size = seq.page_hashes, self.page_size
        for i in range(len(hashes), len(seq.tokens) // size):
            before = hashes[-1] if hashes else hashlib.sha256((seq.request.cache_salt or "").encode()).digest()
            page = array("i", seq.tokens[i * size : (i + 1) * size]).tobytes()
            hashes.append(hashlib.blake2b(before + page, digest_size=16).digest())
        return hashes

    def _longest_prefix(self, hashes: list[bytes]) -> int:
        """Pages of the longest prefix that every group can still serve."""
        length = len(hashes)
        while length:
            missing = -1
            for group, pool in zip(self.groups, self.pools, strict=True):
                first = self._first_visible_page(group, length * self.page_size)
                # Without a window every page is needed, so the first gap decides; with one, the last gap does.
                span = range(length) if group.window is None else range(length - 1, first - 1, -1)
                gap = next((i for i in span if pool.lookup(hashes[i]) is None), -1)
                if gap >= 0:
                    missing = gap if missing < 0 else min(missing, gap)
            if missing < 0:
                return length
            length = missing
        return 0

    # -- windows -----------------------------------------------------------------------------------------------------

    def _first_visible_page(self, group: CacheGroup, position: int) -> int:
        """First page that a query at `position` (or later) sees."""
        return 0 if group.window is None else max(0, position - group.window + 1) // self.page_size

    def _trim(self, group: CacheGroup, pool: BlockPool, table: list[int], position: int) -> None:
        """Frees pages that no query at `position` or later sees."""
        for i in range(min(self._first_visible_page(group, position), len(table)) - 1, -1, -1):
            if table[i] == NULL_PAGE:
                break
            pool.release(table[i])
            table[i] = NULL_PAGE
