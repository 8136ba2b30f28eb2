"""A worker: claims batches from the queue, runs them through an engine, answers them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Protocol, cast

import msgspec

from pjengine.config import EngineConfig
from pjengine.engine_info import EngineInfo
from pjengine.errors import ConfigError, EngineOverloaded, InvalidRequest, PJEngineError, QueueUnavailable
from pjengine.heap import freeze_heap
from pjengine.queue.options import QueueOptions
from pjengine.queue.worker_link import Claim, WorkerLink
from pjengine.request import Output, Request

logger = logging.getLogger(__name__)

BEATS = 3  # in a visibility time-out
POLL_SECONDS = 2e-3  # between looks for another batch while one runs: a step may be as short as a nap
RETRY_SECONDS = 0.5  # between attempts to reach a Redis that is lost
STALLED = 30  # visibility time-outs after which a batch that does not end is left to lapse
# Two batches are in hand, so that the device never waits for the queue: with half of the budget each for documents, a
# query that arrives waits for at most one batch of them.
IN_HAND = 2


class Limits(Protocol):
    """Of an engine's batches: tokens and sequences."""

    budget: int
    max_rows: int


class BatchEngine(Protocol):
    """The face of `EmbeddingEngine`: a step computes one batch, and gives the outputs of the one before."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def runner(self) -> Limits: ...
    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str, index: int | None = None) -> None: ...
    def step(self) -> list[Output]: ...


MakeEngine = Callable[[EngineConfig], BatchEngine]


def make_default_engine(config: EngineConfig) -> BatchEngine:
    """The real engine; imports JAX.

    Raises:
      ConfigError: the model generates.
    """
    from pjengine.factory import generates, make_engine

    if generates(config):
        raise ConfigError(f"model: {config.model} generates text; the queue is for models that embed or classify")
    return cast(BatchEngine, make_engine(config, progress=sys.stderr.isatty()))


def run_worker(options: QueueOptions, config: EngineConfig, make_engine: MakeEngine = make_default_engine) -> int:
    """Works until SIGTERM or SIGINT, then ends the batches in hand; a second signal gives them back at once.

    Returns: the exit code: 0, or 128 + the number of the second signal.
    Raises:
      PJEngineError: it cannot start, or other workers of the queue serve another model.
    """
    link = WorkerLink(options)
    try:
        link.ping()  # before the model is loaded: a wrong URL is known at once
        engine = make_engine(config)
        freeze_heap()
        with _signals() as signals:
            return Worker(engine, link, options, signals).run()
    finally:
        link.close()


@dataclasses.dataclass
class Signals:
    """Those that came; the second one raises StopNow where the worker is."""

    received: list[int] = dataclasses.field(default_factory=list)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if len(self.received) > 1:
            raise StopNow


class StopNow(BaseException):
    """A second signal."""


@dataclasses.dataclass
class _Batch:
    """A claim in hand, and the answers it has so far."""

    claim: Claim
    missing: int
    answers: dict[str, bytes] = dataclasses.field(default_factory=dict)
    started: float = dataclasses.field(default_factory=time.monotonic)


class Worker:
    """See the module. One thread works, another keeps the claims alive."""

    def __init__(self, engine: BatchEngine, link: WorkerLink, options: QueueOptions, signals: Signals):
        self._engine = engine
        self._link = link
        self._options = options
        self._signals = signals
        self._batches: dict[str, _Batch] = {}  # by claim; the beating thread takes snapshots of it
        self._items: dict[str, tuple[str, str]] = {}  # engine's request id -> claim, item
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Request)
        self._ended = threading.Event()
        self._failure: PJEngineError | None = None
        self._next_claim = 0.0  # on time.monotonic's clock
        self._lost = False

    def run(self) -> int:
        """See `run_worker`."""
        self._link.beat(self._engine.info)
        logger.info(
            "worker %s: %s on the queue %r at %s, %d tokens a batch",
            self._link.worker, self._engine.info.model, self._options.name, self._options.address,
            self._engine.runner.budget,
        )  # fmt: skip
        beating = threading.Thread(target=self._beat, daemon=True)
        beating.start()
        try:
            while self._batches or not self._signals.received:
                self._round()
        except StopNow:
            self._give_back(tried=False)
            return 128 + self._signals.received[-1]
        except BaseException:
            self._give_back(tried=True)
            raise
        finally:
            self._ended.set()
            beating.join()
            with contextlib.suppress(QueueUnavailable):
                self._link.leave()
        return 0

    def _round(self) -> None:
        if self._failure is not None:
            raise self._failure
        may_claim = not self._signals.received and len(self._batches) < IN_HAND and not self._alone
        if may_claim and (not self._batches or time.monotonic() >= self._next_claim):
            self._claim()
        if self._engine.has_work:
            for output in self._engine.step():
                self._answer(output)
        elif not self._batches and not self._signals.received:
            self._reach(self._link.wait)

    @property
    def _alone(self) -> bool:
        return any(batch.claim.alone for batch in self._batches.values())

    def _claim(self) -> None:
        limits = self._engine.runner
        claim = self._reach(
            lambda: self._link.claim(limits.budget, limits.max_rows, limits.budget // IN_HAND, len(self._batches))
        )
        if claim is None:
            self._next_claim = time.monotonic() + POLL_SECONDS
            return
        self._batches[claim.id] = _Batch(claim, len(claim.payloads))
        for number, (item, payload) in enumerate(claim.payloads.items()):
            name = f"{claim.id}/{number}"
            self._items[name] = claim.id, item
            try:
                request = self._decoder.decode(payload)
                self._engine.add(msgspec.structs.replace(request, request_id=name, arrival_time=None))
            except (InvalidRequest, EngineOverloaded, msgspec.DecodeError) as error:
                self._answer(Output(request_id=name, finish_reason="error", error=str(error)))

    def _answer(self, output: Output) -> None:
        claim, item = self._items.pop(output.request_id)
        batch = self._batches[claim]
        output.request_id = item
        batch.answers[item] = self._encoder.encode(output)
        batch.missing -= 1
        if batch.missing == 0:
            self._persist(lambda: self._link.complete(claim, batch.answers))
            del self._batches[claim]

    def _reach(self, call: Callable[[], Claim | None]) -> Claim | None:
        """The call's result; None, after a moment, where Redis is lost."""
        try:
            result = call()
        except QueueUnavailable as error:
            self._say_lost(error)
            time.sleep(RETRY_SECONDS)
            return None
        self._say_found()
        return result

    def _persist(self, call: Callable[[], object]) -> None:
        """Repeats the call until Redis has taken it. If the claim lapsed meanwhile, its answers are dropped there."""
        while True:
            try:
                call()
            except QueueUnavailable as error:
                self._say_lost(error)
                time.sleep(RETRY_SECONDS)
            else:
                return self._say_found()

    def _say_lost(self, error: QueueUnavailable) -> None:
        if not self._lost:
            logger.warning("%s; trying again", error)
        self._lost = True

    def _say_found(self) -> None:
        if self._lost:
            logger.warning("the queue is back")
        self._lost = False

    def _give_back(self, *, tried: bool) -> None:
        if self._batches:
            with contextlib.suppress(QueueUnavailable):  # then they lapse
                self._link.give_back(list(self._batches), tried=tried)

    def _beat(self) -> None:
        stalled = STALLED * self._options.visibility
        while not self._ended.wait(self._options.visibility / BEATS):
            young = time.monotonic() - stalled
            claims = [name for name, batch in list(self._batches.items()) if batch.started > young]
            try:
                if lapsed := self._link.beat(self._engine.info, claims) & set(self._batches):
                    logger.warning("%d claims lapsed before they were answered", len(lapsed))
            except QueueUnavailable:
                pass  # the other thread says so
            except ConfigError as error:
                self._failure = error


@contextlib.contextmanager
def _signals() -> Iterator[Signals]:
    signals = Signals()
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, signals.receive) for number in numbers]
    try:
        yield signals
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
