"""WaitingLine: who is packed next. Two classes, by priority and arrival in each, whole sequences up to a budget."""

from __future__ import annotations

from typing import NamedTuple

from pjengine.request import Request

LOOKAHEAD = 32  # requests that do not fit and are passed over for smaller ones behind them
PATIENCE = 8  # batches that may pass over the oldest document before it goes first


class Entry(NamedTuple):
    """A request that waits. arrival: `time.monotonic()` seconds."""

    request: Request
    arrival: float
    tokens: int


class WaitingLine:
    """Requests by class: queries go first, documents get what they leave. In a class lower priorities go first, equal
    ones in order of arrival.

    Among equal priorities nothing starves: what is passed over because it is too long for the rest of a batch stands
    first in the next one, and a document that queries kept out of PATIENCE batches goes before them.
    """

    def __init__(self) -> None:
        self._queries: dict[str, Entry] = {}
        self._documents: dict[str, Entry] = {}
        self._classes = {"query": self._queries, "document": self._documents}
        self._tokens = {"query": 0, "document": 0}  # of the requests that wait
        self._highest = {"query": 0, "document": 0}  # priority of those that wait, at least
        self._unsorted: set[str] = set()  # classes in which a lower priority came behind a higher one
        self._passed = 0  # batches that the oldest document has seen go

    def __len__(self) -> int:
        return len(self._queries) + len(self._documents)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._queries or request_id in self._documents

    @property
    def tokens(self) -> int:
        """Of all requests that wait."""
        return sum(self._tokens.values())

    @property
    def query_tokens(self) -> int:
        return self._tokens["query"]

    @property
    def oldest(self) -> float:
        """The earliest arrival of those that stand first; infinity where nothing waits."""
        return min((_head(entries).arrival for entries in self._classes.values() if entries), default=float("inf"))

    def add(self, request: Request, arrival: float) -> None:
        entry = Entry(request, arrival, len(request.prompt_token_ids))
        entries = self._classes[request.input_type]
        if not entries or request.priority >= self._highest[request.input_type]:
            self._highest[request.input_type] = request.priority
        else:
            self._unsorted.add(request.input_type)
        entries[request.request_id] = entry
        self._tokens[request.input_type] += entry.tokens

    def remove(self, request_id: str) -> None:
        """Unknown ids are ignored."""
        for input_type, entries in self._classes.items():
            if (entry := entries.pop(request_id, None)) is not None:
                self._tokens[input_type] -= entry.tokens

    def take(self, budget: int, max_rows: int) -> list[Entry]:
        """Takes out the next batch: at most `budget` tokens and `max_rows` requests, or one request of more tokens."""
        self._sort()
        batch: list[Entry] = []
        queries, documents = self._queries, self._documents
        oldest = _head(documents) if documents else None
        if oldest is not None and self._passed >= PATIENCE:
            self._move(documents, oldest, batch)
        for entries in (queries, documents):
            if entries and not batch and _head(entries).tokens > budget:
                self._move(entries, _head(entries), batch)
            self._fill(entries, budget - sum(entry.tokens for entry in batch), max_rows - len(batch), batch)
        waits = oldest is not None and oldest.request.request_id in documents
        self._passed = self._passed + 1 if waits else 0
        return batch

    def _sort(self) -> None:
        """Once a batch, since few requests bring a priority, and many may wait."""
        for input_type in self._unsorted:
            entries = self._classes[input_type]
            ordered = sorted(entries.values(), key=lambda entry: entry.request.priority)
            entries.clear()
            entries.update((entry.request.request_id, entry) for entry in ordered)
        self._unsorted.clear()

    def _fill(self, entries: dict[str, Entry], left: int, rows: int, batch: list[Entry]) -> None:
        passed = 0
        fitting: list[Entry] = []
        for entry in entries.values():
            if rows == len(fitting) or left <= 0 or passed > LOOKAHEAD:
                break
            if entry.tokens > left:
                passed += 1
                continue
            fitting.append(entry)
            left -= entry.tokens
        for entry in fitting:
            self._move(entries, entry, batch)

    def _move(self, entries: dict[str, Entry], entry: Entry, batch: list[Entry]) -> None:
        del entries[entry.request.request_id]
        self._tokens[entry.request.input_type] -= entry.tokens
        batch.append(entry)


def _head(entries: dict[str, Entry]) -> Entry:
    return next(iter(entries.values()))
