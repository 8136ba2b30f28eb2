"""The engine's process: takes requests from API processes, steps the engine, sends each its outputs back.

It drains the socket without waiting while the engine has work, and sleeps in poll when it has none.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

import msgspec
import zmq
from tqdm import tqdm

from pjengine.config import EngineConfig
from pjengine.engine_info import EngineInfo
from pjengine.errors import EngineOverloaded, InvalidRequest, PJEngineError
from pjengine.heap import freeze_heap
from pjengine.metrics import Stats
from pjengine.request import Output, Request
from pjengine.serving.engine_socket import has_message
from pjengine.serving.logs import configure_logging
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
from pjengine.serving.processes import become_child

logger = logging.getLogger(__name__)

STATS_INTERVAL = 0.1  # seconds between reports while there is work


class EngineLike(Protocol):
    """The face of an engine (docs/architecture.md)."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str, index: int | None = None) -> None: ...
    def step(self) -> list[Output]: ...
    def stats(self) -> Stats: ...


MakeEngine = Callable[[EngineConfig], EngineLike]

FIRST_CLIENT = "api0"  # the name of the process that starts the engine's


def make_default_engine(config: EngineConfig) -> EngineLike:
    """The real engine; imports JAX, so only the engine's process calls this. No progress bar is drawn into a log."""
    from pjengine.factory import make_engine

    return make_engine(config, progress=sys.stderr.isatty())


def run_engine(make_engine: MakeEngine, config: EngineConfig, address: str, log_level: str) -> None:
    """The entry of the engine's process.

    Args:
      make_engine: picklable; called here, in the new process.
      config: its argument.
      address: ZeroMQ address on which API processes find the engine.
      log_level: of Python's logging.
    """
    become_child()
    configure_logging(log_level)
    tqdm.set_lock(threading.RLock())  # its own is a system-wide semaphore, which a killed process would leave behind
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.set_hwm(0)  # a slow reader must not block the engine; what it owes is bounded by max_tokens
        socket.bind(address)
        link = _Link(socket)
        # A failure is said by the process that started us, whose Hello may come after another's.
        clients = link.wait_hellos(FIRST_CLIENT.encode())
        try:
            engine = make_engine(config)
            freeze_heap()
            EngineLoop(engine, link, clients).run()
            return
        except PJEngineError as error:
            fatal = Fatal(str(error), expected=True)
        except Exception as error:
            logger.exception("the engine failed")
            fatal = Fatal(f"{type(error).__name__}: {error}", expected=False)
        for client in clients:
            link.send(client, fatal)
    raise SystemExit(1)


class _Link:
    """The socket, typed. A client is an API process, named by its ZeroMQ identity."""

    def __init__(self, socket: zmq.Socket[bytes]):
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def send(self, client: bytes, message: FromEngine) -> None:
        """Messages to a client that has gone are dropped."""
        self._socket.send(client, zmq.SNDMORE)
        self._socket.send(self._encoder.encode(message))

    def receive(self, block: bool) -> tuple[bytes, ToEngine] | None:
        """The next message and whose it is; None if there is none and `block` is False."""
        if not block and not has_message(self._socket):
            return None
        client = self._socket.recv()
        return client, self._decoder.decode(self._socket.recv())

    def wait_hellos(self, wanted: bytes) -> list[bytes]:
        """Waits for a client's Hello. Returns: it and those whose Hello came before."""
        clients: list[bytes] = []
        while wanted not in clients:
            received = self.receive(block=True)
            if received is not None and isinstance(received[1], Hello):
                clients.append(received[0])
        return clients


@dataclasses.dataclass(slots=True)
class _Open:
    """An open request: whose it is, and which of its sequences have not ended."""

    client: bytes
    running: set[int]


class EngineLoop:
    """Messages in, steps, outputs out. Ends at Stop, or with what the engine raises in a step.

    Args:
      clients: who has said Hello and not left; kept up to date.
    """

    def __init__(self, engine: EngineLike, link: _Link, clients: list[bytes]):
        self._engine = engine
        self._link = link
        self._clients = clients
        self._open: dict[str, _Open] = {}
        self._stopping = False
        self._stats_due = True  # something changed since the last report
        self._stats_sent = 0.0

    def run(self) -> None:
        for client in self._clients:
            self._welcome(client)
        while not self._stopping:
            self._receive()
            if self._engine.has_work:
                self._stats_due = True
                self._deliver(self._engine.step())
            self._report()

    def _receive(self) -> None:
        idle = not self._engine.has_work
        while (received := self._link.receive(block=idle)) is not None:
            self._handle(*received)
            if self._stopping:
                return
            idle = False  # having waited for one, take what else is there and go on

    def _handle(self, client: bytes, message: ToEngine) -> None:
        match message:
            case Add():
                self._link.send(client, self._add(client, message))
            case Abort(request_id, index):
                self._abort(request_id, index)
            case Hello():
                self._clients.append(client)
                self._welcome(client)
            case Left(left):
                if left in self._clients:
                    self._clients.remove(left)
                for request_id in [i for i, request in self._open.items() if request.client == left]:
                    self._abort(request_id, None)
            case Stop():
                self._stopping = True
        self._stats_due = True

    def _welcome(self, client: bytes) -> None:
        """The figures come first: whoever serves has them, so that no counter seems to fall where a process is new."""
        self._link.send(client, StatsReport(self._engine.stats()))
        self._link.send(client, Ready(self._engine.info))

    def _add(self, client: bytes, message: Add) -> Accepted | Refused:
        added: list[Request] = []
        try:
            for request in message.requests:
                self._engine.add(request)
                added.append(request)
        except (InvalidRequest, EngineOverloaded) as error:
            for request in added:
                self._engine.abort(request.request_id)
            return Refused.of(message.submission, error)
        for request in added:
            self._open[request.request_id] = _Open(client, set(range(request.params.n if request.params else 1)))
        return Accepted(message.submission)

    def _abort(self, request_id: str, index: int | None) -> None:
        self._engine.abort(request_id, index)
        if index is None:
            self._open.pop(request_id, None)
        else:
            self._ended(request_id, index)

    def _ended(self, request_id: str, index: int) -> None:
        if (request := self._open.get(request_id)) is not None:
            request.running.discard(index)
            if not request.running:
                del self._open[request_id]

    def _deliver(self, outputs: list[Output]) -> None:
        """Each API process gets what is new of its own requests, in one message."""
        by_client: dict[bytes, list[Output]] = {}
        for output in outputs:
            if (request := self._open.get(output.request_id)) is None:
                continue  # aborted while its step ran
            by_client.setdefault(request.client, []).append(output)
            if output.finish_reason is not None:
                self._ended(output.request_id, output.index)
        for client, own in by_client.items():
            self._link.send(client, Outputs(own))

    def _report(self) -> None:
        now = time.monotonic()
        if self._stats_due and (not self._engine.has_work or now - self._stats_sent >= STATS_INTERVAL):
            report = StatsReport(self._engine.stats())
            for client in self._clients:
                self._link.send(client, report)
            self._stats_due = False
            self._stats_sent = now
