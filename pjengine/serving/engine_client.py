"""The API process's side of the engine: sends requests, routes outputs to those who wait."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import msgspec

from pjengine.engine_info import EngineInfo
from pjengine.errors import EngineDead, PJEngineError, ShuttingDown
from pjengine.metrics import Stats
from pjengine.queue.client_link import QueueStatus
from pjengine.request import Output, Request
from pjengine.serving.engine_socket import EngineSocket
from pjengine.serving.messages import (
    Abort,
    Accepted,
    Add,
    Fatal,
    FromEngine,
    Hello,
    Left,
    Outputs,
    Ready,
    Refused,
    StatsReport,
    Stop,
    ToEngine,
)

logger = logging.getLogger(__name__)


class Client(Protocol):
    """What an API process needs of the engine, wherever it is: `EngineClient` and `QueueClient`.

    Attributes:
      queue: of one that workers share, its status; else None.
    """

    info: EngineInfo
    stats: Stats
    queue: QueueStatus | None

    @property
    def alive(self) -> bool: ...
    @property
    def open_requests(self) -> int: ...
    async def wait_ready(self) -> None: ...
    async def close(self) -> None: ...
    async def wait_dead(self) -> str: ...
    def require_alive(self) -> None: ...
    async def submit(self, requests: Sequence[Request]) -> Submission: ...
    def abort(self, request_id: str, index: int | None = None) -> None: ...
    def fail(self, reason: str, kind: type[EngineDead] = EngineDead) -> None: ...
    def report_left(self, name: str) -> None: ...
    def _forget(self, request_id: str) -> None: ...


class EngineClient:
    """An API process's connection to the engine. Use from one event loop.

    Args:
      address: the engine's, an EngineHost's.
      name: unique among the API processes of a server, those that have ended included.

    Attributes:
      info: of the engine.
      stats: its latest report; while it works at most about 100 ms old.
      open_requests: requests sent and not ended.
    """

    info: EngineInfo

    def __init__(self, address: str, name: str):
        self.stats = Stats()
        self.queue: QueueStatus | None = None
        self._name = name
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._admissions: dict[str, asyncio.Future[None]] = {}
        self._submissions: dict[str, Submission] = {}  # by request id
        self._ids = itertools.count()
        self._dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._kind = EngineDead  # of the error that says so
        self._ready: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._socket = EngineSocket(address, name, self._receive)
        self._send(Hello())

    async def wait_ready(self) -> None:
        """Waits until the engine can serve.

        Raises:
          PJEngineError: it cannot; the message is the cause.
        """
        waiting: list[asyncio.Future[Any]] = [self._ready, self._dead]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.done():
            raise EngineDead(f"{self._dead.result()} while it started; the lines above may say why")
        self.info = self._ready.result()

    async def close(self) -> None:
        """Ends the connection; open requests get ShuttingDown."""
        self.fail("the server is shutting down", ShuttingDown)
        self._socket.close()

    def stop_engine(self) -> bool:
        """Asks the engine's process to end, once nothing is to be had of it any more; False: it would not hear it."""
        ready = self._ready.done()
        if ready:
            self._send(Stop())
        return ready

    def report_left(self, name: str) -> None:
        """Tells the engine that another API process has ended: what it left running is aborted."""
        if self.alive:
            self._send(Left(name.encode()))

    @property
    def alive(self) -> bool:
        return not self._dead.done()

    @property
    def open_requests(self) -> int:
        return len(self._submissions)

    async def wait_dead(self) -> str:
        """Returns the reason when the engine has died."""
        return await asyncio.shield(self._dead)

    async def submit(self, requests: Sequence[Request]) -> Submission:
        """Hands requests to the engine, all or none; returns when it has taken them.

        Raises:
          InvalidRequest, EngineOverloaded: it refuses them.
          EngineDead: it has ended.
        """
        self.require_alive()
        submission = Submission(self, requests)
        key = str(next(self._ids))
        admission = self._admissions[key] = asyncio.get_running_loop().create_future()
        self._submissions |= {request.request_id: submission for request in requests}
        try:
            self._send(Add(key, list(requests)))
            await admission
        except BaseException:
            submission.close()
            raise
        finally:
            del self._admissions[key]
        return submission

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one sequence of it, at once."""
        if self.alive:
            self._send(Abort(request_id, index))

    def fail(self, reason: str, kind: type[EngineDead] = EngineDead) -> None:
        """The engine counts as dead from now on: every open request gets a `kind`. Later calls change nothing."""
        if not self.alive:
            return
        self._kind = kind
        self._dead.set_result(reason)
        for admission in self._admissions.values():
            if not admission.done():
                admission.set_exception(kind(reason))
        for submission in set(self._submissions.values()):
            submission._fail(kind(reason))

    def _forget(self, request_id: str) -> None:
        self._submissions.pop(request_id, None)

    def require_alive(self) -> None:
        """Raises EngineDead if the engine has died."""
        if not self.alive:
            raise self._kind(self._dead.result())

    def _send(self, message: ToEngine) -> None:
        self._socket.send(self._encoder.encode(message))

    def _receive(self, message: bytes) -> None:
        try:
            self._handle(self._decoder.decode(message))
        except Exception as error:
            logger.error("the engine's messages cannot be handled", exc_info=error)
            self.fail(f"{type(error).__name__}: {error}")

    def _handle(self, message: FromEngine) -> None:
        match message:
            case Outputs(outputs):
                now = time.monotonic()
                for output in outputs:
                    if (submission := self._submissions.get(output.request_id)) is not None:
                        submission._deliver(output, now)
            case StatsReport(stats):
                self.stats = stats
            case Accepted(key):
                if (admission := self._admissions.get(key)) is not None and not admission.done():
                    admission.set_result(None)
            case Refused(key):
                if (admission := self._admissions.get(key)) is not None and not admission.done():
                    admission.set_exception(message.error())
            case Fatal(reason, expected):
                if self._ready.done():
                    self.fail(f"the engine failed: {reason}")
                else:
                    self._ready.set_exception(
                        PJEngineError(reason if expected else f"the engine failed to start: {reason}")
                    )
            case Ready(info):
                if self._ready.done():
                    raise PJEngineError("the engine said Ready twice")
                self._ready.set_result(info)


class Submission:
    """Requests the engine has taken, and the channel on which their outputs come back.

    Whoever stops reading before the end calls `close`: what still runs is aborted and its pages are freed.

    Attributes:
      request_ids: in the order they were given.
    """

    def __init__(self, client: Client, requests: Sequence[Request]):
        self.request_ids = [request.request_id for request in requests]
        self._client = client
        self._running = {
            request.request_id: set(range(request.params.n if request.params else 1)) for request in requests
        }
        self._arrived: list[tuple[Output, float]] = []
        self._error: PJEngineError | None = None
        self._wake = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[list[tuple[Output, float]]]:
        """Yields what has arrived since the last time, each output with its `time.monotonic()`, until all have ended.

        Raises:
          PJEngineError: the engine ended, or the queue was lost or did not answer in time.
        """
        while self._running or self._arrived:
            await self._wake.wait()
            self._wake.clear()
            arrived, self._arrived = self._arrived, []
            if arrived:
                yield arrived
            if self._error is not None:
                raise self._error

    def end(self, request_id: str, index: int) -> None:
        """Aborts one sequence; its later outputs are dropped."""
        if index in self._running.get(request_id, ()):
            self._client.abort(request_id, index)
            self._sequence_ended(request_id, index)

    def close(self) -> None:
        """Aborts whatever still runs."""
        for request_id in list(self._running):
            self._client.abort(request_id)
            self._client._forget(request_id)
        self._running.clear()

    def _deliver(self, output: Output, now: float) -> None:
        if output.index not in self._running[output.request_id]:
            return
        self._arrived.append((output, now))
        if output.finish_reason is not None:
            self._sequence_ended(output.request_id, output.index)
        self._wake.set()

    def _sequence_ended(self, request_id: str, index: int) -> None:
        self._running[request_id].discard(index)
        if not self._running[request_id]:
            del self._running[request_id]
            self._client._forget(request_id)
        self._wake.set()

    def _fail(self, error: PJEngineError) -> None:
        self._error = error
        self._wake.set()
