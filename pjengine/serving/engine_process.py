"""The engine's process: takes requests from a socket, steps the engine, sends outputs back.

It drains the socket without waiting while the engine has work, and sleeps in poll when it has none.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
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
from pjengine.metrics import Stats
from pjengine.request import Output, Request
from pjengine.serving.logs import configure_logging
from pjengine.serving.messages import (
    Abort,
    Accepted,
    Add,
    Fatal,
    FromEngine,
    Outputs,
    Ready,
    Refused,
    StatsReport,
    Stop,
    ToEngine,
)

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


def make_default_engine(config: EngineConfig) -> EngineLike:
    """The real engine; imports JAX, so only the engine's process calls this."""
    from pjengine.factory import make_engine

    return make_engine(config)


def run_engine(make_engine: MakeEngine, config: EngineConfig, address: str, log_level: str) -> None:
    """The entry of the engine's process.

    Args:
      make_engine: picklable; called here, in the new process.
      config: its argument.
      address: ZeroMQ address on which the API process listens.
      log_level: of Python's logging.
    """
    # Ctrl-C reaches the whole process group: it is the API process that decides when the engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging(log_level)
    tqdm.set_lock(threading.RLock())  # its own is a system-wide semaphore, which a killed process would leave behind
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.set_hwm(0)  # a slow reader must not block the engine; what it owes is bounded by max_tokens
        socket.connect(address)
        link = _Link(socket)
        try:
            EngineLoop(make_engine(config), link).run()
        except PJEngineError as error:
            link.send(Fatal(str(error), expected=True))
            raise SystemExit(1) from None
        except Exception as error:
            logger.exception("the engine failed")
            link.send(Fatal(f"{type(error).__name__}: {error}", expected=False))
            raise SystemExit(1) from None


class _Link:
    """The socket, typed."""

    def __init__(self, socket: zmq.Socket[bytes]):
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message: FromEngine) -> None:
        self._socket.send(self._encoder.encode(message))

    def receive(self, block: bool) -> ToEngine | None:
        """The next message; None if there is none and `block` is False."""
        with contextlib.suppress(zmq.Again):
            return self._decoder.decode(self._socket.recv(0 if block else zmq.NOBLOCK))
        return None


class EngineLoop:
    """Messages in, steps, outputs out. Ends at Stop, or with what the engine raises in a step."""

    def __init__(self, engine: EngineLike, link: _Link):
        self._engine = engine
        self._link = link
        self._stopping = False
        self._stats_due = True  # something changed since the last report
        self._stats_sent = 0.0

    def run(self) -> None:
        self._link.send(Ready(self._engine.info))
        while not self._stopping:
            self._receive()
            if self._engine.has_work:
                self._stats_due = True
                if outputs := self._engine.step():
                    self._link.send(Outputs(outputs))
            self._report()

    def _receive(self) -> None:
        idle = not self._engine.has_work
        while (message := self._link.receive(block=idle)) is not None:
            self._handle(message)
            if self._stopping:
                return
            idle = False  # having waited for one, take what else is there and go on

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Add():
                self._link.send(self._add(message))
            case Abort(request_id, index):
                self._engine.abort(request_id, index)
            case Stop():
                self._stopping = True
        self._stats_due = True

    def _add(self, message: Add) -> Accepted | Refused:
        added: list[Request] = []
        try:
            for request in message.requests:
                self._engine.add(request)
                added.append(request)
        except (InvalidRequest, EngineOverloaded) as error:
            for request in added:
                self._engine.abort(request.request_id)
            return Refused.of(message.submission, error)
        return Accepted(message.submission)

    def _report(self) -> None:
        now = time.monotonic()
        if self._stats_due and (not self._engine.has_work or now - self._stats_sent >= STATS_INTERVAL):
            self._link.send(StatsReport(self._engine.stats()))
            self._stats_due = False
            self._stats_sent = now


def _exit_with_parent() -> None:
    """An engine without its API process serves nobody and holds the device's memory: it ends at once."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
