"""The front door's side of the queue: puts items in and takes answers out. For one asyncio event loop."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from pjengine.engine_info import EngineInfo
from pjengine.errors import EngineOverloaded, QueueUnavailable
from pjengine.queue.options import QueueOptions
from pjengine.queue.scripts import WAIT_SECONDS, connect, keys_of, redis_errors, redis_module, script, unavailable

LEASE_SECONDS = 15.0  # a front door that says nothing for so long counts as gone, and its items are dropped
RESULTS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class Item:
    """What is put in.

    Attributes:
      id: unique in the queue.
      document: of the class that gives way to queries.
      tokens: of the request.
      payload: msgpack of the `Request`.
    """

    id: str
    document: bool
    tokens: int
    payload: bytes


@dataclasses.dataclass(frozen=True)
class QueueStatus:
    """A snapshot of a queue.

    Attributes:
      queries, documents: items that wait.
      claimed: items that workers hold; claims: in how many batches.
      workers: that are alive.
      fingerprint, info: of the model they serve (`WorkerLink.beat`); "" and None: there was no worker yet.
      counters: what the scripts count, by name; they only grow.
    """

    queries: int = 0
    documents: int = 0
    claimed: int = 0
    workers: int = 0
    claims: int = 0
    fingerprint: str = ""
    info: EngineInfo | None = None
    counters: Mapping[str, int] = dataclasses.field(default_factory=dict)


class ClientLink:
    """A session of one front door. A session that is lost stays lost: make a new one.

    Every method raises QueueUnavailable where Redis is lost or refuses; none is repeated by itself.

    Attributes:
      client: this session's id.
    """

    def __init__(self, options: QueueOptions):
        self.client = uuid.uuid4().hex[:16]
        self._options = options
        self._redis = connect(options, asynchronous=True)
        self._errors = redis_errors()
        self._no_script = redis_module().exceptions.NoScriptError
        self._keys = keys_of(options.name)
        self._results = self._keys[-1] + self.client

    async def join(self) -> QueueStatus:
        """Begins the session."""
        return await self._beat("join")

    async def beat(self) -> QueueStatus:
        """Keeps the session; to be called more often than once in LEASE_SECONDS."""
        return await self._beat("")

    async def submit(self, items: Sequence[Item], max_waiting: int) -> None:
        """Puts items in, all or none.

        Raises:
          EngineOverloaded: more than `max_waiting` would wait.
        """
        timeout = int(self._options.timeout * 1000)
        arguments = itertools.chain.from_iterable(
            (item.id, "document" if item.document else "query", item.tokens, timeout, item.payload) for item in items
        )
        status, *rest = await self._run("submit", self.client, max_waiting, self._options.max_deliveries, *arguments)
        if status == b"lost":
            raise QueueUnavailable(f"the queue at {self._options.address} has forgotten this server")
        if status == b"full":
            raise EngineOverloaded(f"{rest[0]} items wait in the queue, and max_waiting is {max_waiting}; retry later")

    async def results(self) -> list[bytes]:
        """Answers that have come, msgpack of `Output` each; waits for the first, a second at most."""
        with self._reported():
            first = await self._redis.blpop([self._results], timeout=WAIT_SECONDS)
            if first is None:
                return []
            return [first[1], *(await self._redis.lpop(self._results, RESULTS_AT_ONCE) or [])]

    async def cancel(self, items: Sequence[str]) -> None:
        """Drops items; unknown ones are ignored."""
        await self._run("cancel", *items)

    async def leave(self) -> None:
        """Ends the session: its items are dropped."""
        await self._run("client_leave", self.client)

    async def close(self) -> None:
        with contextlib.suppress(*self._errors):
            await self._redis.aclose()

    async def _beat(self, join: str) -> QueueStatus:
        reply = await self._run("client_beat", self.client, int(LEASE_SECONDS * 1000), join)
        if not reply:
            raise QueueUnavailable(f"the queue at {self._options.address} has forgotten this server")
        *numbers, digest, info = reply[:7]
        queries, documents, claimed, workers, claims = numbers
        return QueueStatus(
            queries,
            documents,
            claimed,
            workers,
            claims,
            digest.decode(),
            msgspec.msgpack.decode(info, type=EngineInfo) if info else None,
            {name.decode(): int(value) for name, value in zip(reply[7::2], reply[8::2], strict=True)},
        )

    async def _run(self, name: str, *arguments: Any) -> Any:
        text, digest = script(name)
        with self._reported():
            try:
                return await self._redis.evalsha(digest, len(self._keys), *self._keys, *arguments)
            except self._no_script:
                return await self._redis.eval(text, len(self._keys), *self._keys, *arguments)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise unavailable(self._options, error) from error
