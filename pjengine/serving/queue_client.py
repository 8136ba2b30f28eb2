"""The API process's side of a queue: the face of EngineClient, with the engines in workers on any machine.

A session with Redis that breaks fails whatever is open with QueueUnavailable (503) and is replaced by a new one:
nothing waits for an answer that may have been lost. The old session's items are dropped by the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import PurePath

import msgspec

from pjengine.config import EngineConfig
from pjengine.engine_info import EngineInfo
from pjengine.errors import ConfigError, DeadlineExceeded, EngineDead, PJEngineError, QueueUnavailable, ShuttingDown
from pjengine.metrics import Stats
from pjengine.queue.client_link import ClientLink, Item, QueueStatus
from pjengine.queue.options import QueueOptions
from pjengine.request import Output, Request, Timings
from pjengine.serving.engine_client import Submission

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
RETRY_SECONDS = 0.5
LATE_SECONDS = 5.0  # an item that the queue has not answered so long after its deadline is lost


class QueueClient:
    """See the module. Use from one event loop.

    Args:
      options: of the queue.
      config: `model` must be the workers'; `max_waiting` limits what waits in the queue, from all servers.
      name: of this API process; for nothing but messages.

    Attributes:
      info: of the workers' engines.
      stats: of the queue, about a second old.
      queue: its status, of the same age.
      open_requests: requests sent and not ended.
    """

    info: EngineInfo

    def __init__(self, options: QueueOptions, config: EngineConfig, name: str):
        self.stats = Stats()
        self.queue: QueueStatus | None = QueueStatus()
        self._options = options
        self._config = config
        self._name = name
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Output)
        self._submissions: dict[str, Submission] = {}  # by request id
        self._late: dict[str, float] = {}  # by request id: when it counts as lost, on time.monotonic's clock
        self._cancelled: list[str] = []
        self._link: ClientLink | None = None  # of the session; None while Redis is lost
        self._lost = ""
        self._session: asyncio.Task[None] | None = None
        self._cancelling: asyncio.Task[None] | None = None
        self._fingerprint = ""
        self._dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._kind = EngineDead  # of the error that says so

    async def wait_ready(self) -> None:
        """Waits until there is a worker.

        Raises:
          QueueUnavailable: Redis cannot be reached.
          ConfigError: the workers serve another model.
        """
        self._link = ClientLink(self._options)
        status = await self._link.join()
        if not status.workers:
            logger.info("waiting for a worker on the queue %r at %s", self._options.name, self._options.address)
        while not status.workers or status.info is None:
            await asyncio.sleep(BEAT_SECONDS)
            status = await self._link.beat()
        self.info = status.info
        ours, theirs = PurePath(self._config.model).name, PurePath(self.info.model).name
        if ours != theirs:
            raise ConfigError(
                f"model: the workers of the queue {self._options.name!r} serve {theirs}, not {ours}; "
                "serve that, or give --queue-name"
            )
        self._fingerprint = status.fingerprint
        self._take(status)
        self._session = asyncio.create_task(self._keep_session(self._link))

    async def close(self) -> None:
        """Ends the session; open requests get ShuttingDown."""
        self.fail("the server is shutting down", ShuttingDown)
        for task in (self._session, self._cancelling):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, PJEngineError):
                    await task
        if self._link is not None:
            with contextlib.suppress(QueueUnavailable):
                await self._link.leave()
            await self._link.close()

    @property
    def alive(self) -> bool:
        return not self._dead.done()

    @property
    def open_requests(self) -> int:
        return len(self._submissions)

    async def wait_dead(self) -> str:
        """Returns the reason when this server cannot go on. A Redis that is lost is none: it may come back."""
        return await asyncio.shield(self._dead)

    def require_alive(self) -> None:
        """Raises EngineDead or QueueUnavailable unless requests are served now."""
        self._require_link()

    async def submit(self, requests: Sequence[Request]) -> Submission:
        """Puts requests into the queue, all or none; their ids must be unique in the queue, not only here.

        Raises:
          EngineOverloaded: too many wait.
          QueueUnavailable: Redis is lost, or no worker is alive.
          ShuttingDown: this server is.
        """
        link = self._require_link()
        items = [
            Item(r.request_id, r.input_type == "document", len(r.prompt_token_ids), self._encoder.encode(r))
            for r in requests
        ]
        submission = Submission(self, requests)
        late = time.monotonic() + self._options.timeout + LATE_SECONDS
        self._submissions |= {item.id: submission for item in items}
        self._late |= dict.fromkeys((item.id for item in items), late)
        try:
            await link.submit(items, self._config.max_waiting)
        except BaseException:
            submission.close()
            raise
        return submission

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drops a request from the queue."""
        self._cancelled.append(request_id)
        if self._cancelling is None or self._cancelling.done():
            self._cancelling = asyncio.create_task(self._cancel())

    def fail(self, reason: str, kind: type[EngineDead] = EngineDead) -> None:
        """Nothing is served from now on: every open request gets a `kind`. Later calls change nothing."""
        if self.alive:
            self._kind = kind
            self._dead.set_result(reason)
            self._fail_open(kind(reason))

    def report_left(self, name: str) -> None:
        """Another API process has ended: the queue drops its items by itself when its lease ends."""

    def _forget(self, request_id: str) -> None:
        self._submissions.pop(request_id, None)
        self._late.pop(request_id, None)

    def _require_link(self) -> ClientLink:
        if not self.alive:
            raise self._kind(self._dead.result())
        if self._link is None:
            raise QueueUnavailable(self._lost)
        if self.queue is None or not self.queue.workers:
            raise QueueUnavailable(f"no worker is alive on the queue {self._options.name!r}; retry later")
        return self._link

    def _fail_open(self, error: PJEngineError) -> None:
        for submission in set(self._submissions.values()):
            submission._fail(error)

    async def _keep_session(self, link: ClientLink) -> None:
        """Beats and receives; where Redis is lost, fails what is open and begins anew, for ever."""
        while True:
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._beat(link))
                    tasks.create_task(self._receive(link))
            except* QueueUnavailable as errors:
                self._lost = str(errors.exceptions[0])
            logger.error("%s; open requests get 503 until it is back", self._lost)
            self._link = None
            self._fail_open(QueueUnavailable(self._lost))
            await link.close()
            link = await self._rejoin()
            logger.warning("the queue is back")

    async def _rejoin(self) -> ClientLink:
        while True:
            link = ClientLink(self._options)
            try:
                self._take(await link.join())
            except QueueUnavailable as error:
                self._lost = str(error)
                await link.close()
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self._link = link
                return link

    async def _beat(self, link: ClientLink) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            self._take(await link.beat())
            now = time.monotonic()
            for request_id in [request_id for request_id, late in self._late.items() if late < now]:
                if request_id in self._submissions:
                    self._submissions[request_id]._fail(DeadlineExceeded("the queue has lost the request; retry"))

    async def _receive(self, link: ClientLink) -> None:
        while True:
            arrived = await link.results()
            now = time.monotonic()
            for output in map(self._decoder.decode, arrived):
                if (submission := self._submissions.get(output.request_id)) is None:
                    continue  # its client has left
                if (there := output.timings) is not None:  # the worker's clock began when it claimed the item
                    submitted = self._late[output.request_id] - self._options.timeout - LATE_SECONDS
                    queued = now - submitted - (there.finished - there.queued)
                    output.timings = Timings(queued=queued, first_token=now - submitted, finished=now - submitted)
                if output.finish_reason == "timeout":
                    submission._fail(DeadlineExceeded(output.error or "timeout"))
                else:
                    submission._deliver(output, now)

    async def _cancel(self) -> None:
        while self._cancelled:
            cancelled, self._cancelled = self._cancelled, []
            if self._link is not None:
                with contextlib.suppress(QueueUnavailable):
                    await self._link.cancel(cancelled)

    def _take(self, status: QueueStatus) -> None:
        if status.workers and status.fingerprint != self._fingerprint:
            self.fail(f"the workers of the queue {self._options.name!r} now serve another model: {status.info}")
        self.queue = status
        counters = status.counters
        self.stats = Stats(
            running=status.claimed,
            waiting=status.queries + status.documents,
            prompt_tokens=counters.get("answered_tokens", 0),
            step_tokens=counters.get("answered_tokens", 0),
            steps=counters.get("claims", 0),
        )
