"""EmbeddingEngine: whole sequences, embedded or classified, packed to a token budget as the device becomes free."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from pjengine.engine_info import EngineInfo
from pjengine.errors import EngineOverloaded, InvalidRequest
from pjengine.metrics import Stats
from pjengine.request import Output, Request, Timings
from pjengine.request_checks import check_prompt, check_token_types
from pjengine.token_budget import CurvePoint
from pjengine.waiting_line import WaitingLine


class Batch(Protocol):
    """A batch on its way. bucket_tokens: of the compiled shape it runs in."""

    @property
    def bucket_tokens(self) -> int: ...
    @property
    def done(self) -> bool:
        """Whether `read` would not wait."""
        ...

    def read(self) -> np.ndarray:
        """The vectors; waits for the device."""
        ...


class Runner(Protocol):
    """Embeds or classifies sequences without waiting for the device.

    Attributes:
      budget: tokens of a batch at which the device is saturated.
      max_rows: most sequences of a batch.
      max_tokens: of the longest sequence, or of the largest batch that fits at all.
      knee: the budget as it was measured; None: it was given.
    """

    budget: int
    max_rows: int
    max_tokens: int
    knee: CurvePoint | None

    def measure(self) -> list[CurvePoint]:
        """Seconds of full batches of each compiled size."""
        ...

    def dispatch(self, requests: list[Request]) -> Batch:
        """Starts a batch of at most `max_rows` requests of `budget` tokens in all, or a single longer one."""
        ...


class _Running(NamedTuple):
    """A batch on the device. dispatched: when, by the clock."""

    requests: list[Request]
    batch: Batch
    dispatched: float


class EmbeddingEngine:
    """The face of `Engine`, for models that embed or classify. Not thread-safe: one thread calls it.

    Batches form by token count, as late as they can: the next one is packed and dispatched when the running one is
    nearly done. So the device goes from one to the next, and a query waits for no more than the batch that runs (and,
    should it come within the last LEAD seconds of it, for one more). Where queries alone fill the next batch, nothing
    is won by waiting, since whoever comes now stands behind them: it is dispatched behind the running one at once.

    Args:
      max_wait: seconds that a request may wait on a free device for others to come, as long as they fill no batch.
      clock, sleep: as in `time`; tests bring their own.
    """

    LEAD = 1e-3  # seconds before the running batch's end, beside the time a dispatch takes, at which the next is packed
    NAP = 2e-4  # seconds of sleep at most, in which nothing is taken in
    DEPTH = 2  # batches on the device, one of which waits for the other
    FEW = 4  # such a part of a full batch, or less, is launched behind the results of one that is done

    def __init__(
        self,
        info: EngineInfo,
        runner: Runner,
        max_waiting: int = 16384,
        max_wait: float = 0.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.info = info
        self.runner = runner
        self.max_waiting = max_waiting
        self.max_wait = max_wait
        self._clock, self._sleep = clock, sleep
        self._line = WaitingLine()
        self._running: dict[str, tuple[Request, float, float]] = {}  # with the times of arrival and dispatch
        self._in_flight: deque[_Running] = deque()  # oldest first; at most DEPTH
        self._seconds: dict[int, float] = {}  # of a batch, by its bucket's tokens
        self._dispatch_seconds = 0.0
        self._last_end = float("-inf")  # when the last batch was done
        self._prompt_tokens = 0
        self._steps = 0
        self._padded_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._line or self._in_flight)

    def add(self, request: Request) -> None:
        """Queues a text.

        Raises:
          InvalidRequest: this model cannot take it; no other request is affected.
          EngineOverloaded: `max_waiting` requests wait already.
        """
        info, prompt = self.info, request.prompt_token_ids
        if request.params is not None:
            raise InvalidRequest(
                f"model: {info.model} is of kind {info.kind} and does not generate; use a model of kind generate",
                field="model",
            )
        if request.request_id in self._line or request.request_id in self._running:
            raise InvalidRequest(f"request_id: {request.request_id!r} is in use by an open request", field="request_id")
        check_prompt(prompt, info, field="input")
        check_token_types(request, info)
        if len(self._line) >= self.max_waiting:
            raise EngineOverloaded(f"{len(self._line)} requests are waiting (max_waiting); retry later")
        self._line.add(request, self._clock() if request.arrival_time is None else request.arrival_time)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drops a request. Unknown ids are ignored: it may just have finished."""
        self._line.remove(request_id)
        self._running.pop(request_id, None)

    def step(self) -> list[Output]:
        """One round: the results of a batch that is done, or [] after a nap, if it is too early for anything."""
        while len(self._in_flight) < self.DEPTH and self._line.query_tokens >= self.runner.budget:
            self._dispatch()
        if (nap := self._nap()) > 0:
            self._sleep(min(nap, self.NAP))
            return []
        finished = self._in_flight.popleft() if self._in_flight else None
        # Results that are there do not wait for the launch of few others, which takes the host as long as the device
        # needs for them. Where more wait the device must not stand idle meanwhile.
        few = self._line.tokens * self.FEW <= self.runner.budget
        if self._line and not self._in_flight and not (few and finished and finished.batch.done):
            self._dispatch()
        return self._outputs(finished) if finished else []

    def stats(self) -> Stats:
        knee = self.runner.knee
        return Stats(
            running=len(self._running),
            waiting=len(self._line),
            prompt_tokens=self._prompt_tokens,
            steps=self._steps,
            step_tokens=self._prompt_tokens,
            padded_tokens=self._padded_tokens,
            batch_budget=self.runner.budget,
            knee_tokens=knee.tokens if knee else 0,
            knee_seconds=knee.seconds if knee else 0.0,
        )

    def _nap(self) -> float:
        """Seconds until it is time to pack the next batch, or to wait for the running one; 0 or less: now."""
        now = self._clock()
        if not self._in_flight:
            return self._line.oldest + self.max_wait - now if self._line.tokens < self.runner.budget else 0.0
        running = self._in_flight[0]
        seconds = self._seconds.get(running.batch.bucket_tokens)
        if seconds is None or running.batch.done:
            return 0.0
        wait = self._start(running) + seconds - now
        if len(self._in_flight) == self.DEPTH:
            return wait
        # Who is still dispatching when the running batch ends does not see its end, and would learn a wrong one.
        return wait - self.LEAD - self._dispatch_seconds

    def _dispatch(self) -> None:
        began = self._clock()
        entries = self._line.take(self.runner.budget, self.runner.max_rows)
        requests = [entry.request for entry in entries]
        batch = self.runner.dispatch(requests)
        now = self._clock()
        self._dispatch_seconds += (now - began - self._dispatch_seconds) / 8
        self._steps += 1
        self._padded_tokens += batch.bucket_tokens
        for request, arrival, tokens in entries:
            self._running[request.request_id] = request, arrival, now
            self._prompt_tokens += tokens
        self._in_flight.append(_Running(requests, batch, now))

    def _start(self, running: _Running) -> float:
        """When the device began with a batch: once it was there, and the one before it was done."""
        return max(running.dispatched, self._last_end)

    def _outputs(self, running: _Running) -> list[Output]:
        results = np.ascontiguousarray(running.batch.read(), "<f4")
        classify = self.info.kind == "classify"
        now = self._clock()
        self._learn(running, now)
        outputs = []
        for request, result in zip(running.requests, results, strict=True):
            entry = self._running.get(request.request_id)
            if entry is None or entry[0] is not request:
                continue  # aborted
            del self._running[request.request_id]
            _, arrival, dispatched = entry
            values = result.tobytes()
            outputs.append(
                Output(
                    request_id=request.request_id,
                    embedding=None if classify else values,
                    logits=values if classify else None,
                    finish_reason="stop",
                    timings=Timings(queued=dispatched - arrival, first_token=now - arrival, finished=now - arrival),
                )
            )
        return outputs

    def _learn(self, running: _Running, now: float) -> None:
        """How long such a batch takes. A shorter time is believed at once: waiting too long leaves the device idle."""
        seconds, known = now - self._start(running), self._seconds.get(running.batch.bucket_tokens)
        self._last_end = now
        if known is not None and seconds > known:
            seconds = known + (seconds - known) / 8
        self._seconds[running.batch.bucket_tokens] = seconds
