"""The pages of one cache group: who holds which, and which free ones still hold a reusable prefix."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

NULL_PAGE = 0  # never handed out: block tables point at it where there is nothing to see


class BlockPool:
    """Fixed pages with reference counts.

    A page is held (references > 0) or free. A full page may be registered under the hash of everything up to its end;
    it keeps the registration when it becomes free, so that a later prompt can take it back, until it is handed out for
    new content. Free pages are handed out least recently used first, those with nothing to reuse before all others.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_pages))
        self.num_cached = 0  # free pages that can be taken back by their hash

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - 1 - len(self._free)

    def allocate(self) -> int:
        """Hands out a free page with one reference. The caller has checked `num_free`."""
        page, _ = self._free.popitem(last=False)
        self.num_cached -= self._hash_of[page] is not None
        self._unregister(page)
        self._references[page] = 1
        return page

    def retain(self, page: int) -> None:
        """One more holder of a held or free registered page."""
        if self._references[page] == 0:
            del self._free[page]
            self.num_cached -= 1
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One holder less; the last one makes the page free."""
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free[page] = None
            if self._hash_of[page] is None:
                self._free.move_to_end(page, last=False)
            else:
                self.num_cached += 1

    def writable(self, page: int) -> bool:
        """Whether its one holder may write it: nobody else reads it, and nobody can find it by its hash."""
        return self._references[page] == 1 and self._hash_of[page] is None

    def lookup(self, page_hash: bytes) -> int | None:
        return self._page_of.get(page_hash)

    def is_free(self, page: int) -> bool:
        return self._references[page] == 0

    def register(self, page: int, page_hash: bytes) -> None:
        """Makes a full page findable. The first page with a content wins; later equal ones stay private."""
        if page_hash not in self._page_of and self._hash_of[page] is None:
            self._page_of[page_hash] = page
            self._hash_of[page] = page_hash

    def forget(self) -> None:
        """No page is registered any more."""
        self._page_of.clear()
        self._hash_of = [None] * self.num_pages
        self.num_cached = 0

    def _unregister(self, page: int) -> None:
        page_hash = self._hash_of[page]
        if page_hash is not None:
            del self._page_of[page_hash]
            self._hash_of[page] = None

    def check_integrity(self, holders: Iterable[int]) -> None:
        """Raises RuntimeError unless `holders` (each page once per holder) explain every reference and every free
        page.
        """
        expected = Counter(holders)
        problems = [
            f"page {p}: {self._references[p]} references, {expected[p]} holders"
            for p in range(self.num_pages)
            if self._references[p] != expected[p]
        ]
        problems += [
            f"page {p}: {'free' if p in self._free else 'not free'} with {self._references[p]} references"
            for p in range(1, self.num_pages)
            if (p in self._free) != (self._references[p] == 0)
        ]
        problems += [
            f"page {p}: hash does not lead back to it" for h, p in self._page_of.items() if self._hash_of[p] != h
        ]
        if NULL_PAGE in self._free or expected[NULL_PAGE]:
            problems.append("the null page was handed out")
        if self.num_cached != sum(self._hash_of[p] is not None for p in self._free):
            problems.append(f"num_cached is {self.num_cached}")
        if sum(h is not None for h in self._hash_of) != len(self._page_of):
            problems.append("a page is registered under a hash that does not find it")
        if problems:
            raise RuntimeError("block pool: " + "; ".join(problems))
