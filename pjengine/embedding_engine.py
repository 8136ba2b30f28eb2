"""EmbeddingEngine: whole sequences, embedded or classified, packed to a token budget in the order they came."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np

from pjengine.engine_info import EngineInfo
from pjengine.errors import EngineOverloaded, InvalidRequest
from pjengine.metrics import Stats
from pjengine.request import Output, Request, Timings
from pjengine.request_checks import check_prompt, check_token_types


class Batch(Protocol):
    """A batch on its way; `read` waits for the device. bucket_tokens: of the compiled shape it runs in."""

    @property
    def bucket_tokens(self) -> int: ...
    def read(self) -> np.ndarray: ...


class Runner(Protocol):
    """Embeds or classifies at most `max_rows` sequences of at most `budget` tokens in all per call, without waiting
    for the device.
    """

    budget: int
    max_rows: int

    def dispatch(self, requests: list[Request]) -> Batch: ...


class EmbeddingEngine:
    """The face of `Engine`, for models that embed or classify. Not thread-safe: one thread calls it.

    Batches form by token count. While one runs, the next is packed and dispatched, so a step returns the results
    of the one before.
    """

    def __init__(self, info: EngineInfo, runner: Runner, max_waiting: int = 16384):
        self.info = info
        self.runner = runner
        self.max_waiting = max_waiting
        self._waiting: dict[str, tuple[Request, float]] = {}  # in order of arrival
        self._running: dict[str, tuple[Request, float, float]] = {}  # with the times of arrival and dispatch
        self._in_flight: tuple[list[Request], Batch] | None = None
        self._prompt_tokens = 0
        self._steps = 0
        self._padded_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting) or self._in_flight is not None

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
        if request.request_id in self._waiting or request.request_id in self._running:
            raise InvalidRequest(f"request_id: {request.request_id!r} is in use by an open request", field="request_id")
        check_prompt(prompt, info, field="input")
        check_token_types(request, info)
        if len(self._waiting) >= self.max_waiting:
            raise EngineOverloaded(f"{len(self._waiting)} requests are waiting (max_waiting); retry later")
        arrival = request.arrival_time if request.arrival_time is not None else time.monotonic()
        self._waiting[request.request_id] = request, arrival

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drops a request. Unknown ids are ignored: it may just have finished."""
        self._waiting.pop(request_id, None)
        self._running.pop(request_id, None)

    def step(self) -> list[Output]:
        """One round; returns the results of the batch before."""
        batch = self._pack()
        started = None
        if batch:
            started = batch, self.runner.dispatch(batch)
            self._steps += 1
            self._padded_tokens += started[1].bucket_tokens
            self._prompt_tokens += sum(len(r.prompt_token_ids) for r in batch)
        finished, self._in_flight = self._in_flight, started
        return self._outputs(*finished) if finished else []

    def stats(self) -> Stats:
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            prompt_tokens=self._prompt_tokens,
            steps=self._steps,
            step_tokens=self._prompt_tokens,
            padded_tokens=self._padded_tokens,
        )

    def _pack(self) -> list[Request]:
        batch: list[Request] = []
        left = self.runner.budget
        now = time.monotonic()
        for request, arrival in self._waiting.values():
            if len(request.prompt_token_ids) > left or len(batch) == self.runner.max_rows:
                break
            batch.append(request)
            left -= len(request.prompt_token_ids)
            self._running[request.request_id] = request, arrival, now
        for request in batch:
            del self._waiting[request.request_id]
        return batch

    def _outputs(self, batch: list[Request], running: Batch) -> list[Output]:
        results = np.ascontiguousarray(running.read(), "<f4")
        field = "logits" if self.info.kind == "classify" else "embedding"
        now = time.monotonic()
        outputs = []
        for request, result in zip(batch, results, strict=True):
            entry = self._running.get(request.request_id)
            if entry is None or entry[0] is not request:
                continue  # aborted
            del self._running[request.request_id]
            _, arrival, dispatched = entry
            timings = Timings(queued=dispatched - arrival, first_token=now - arrival, finished=now - arrival)
            output = Output(request_id=request.request_id, finish_reason="stop", timings=timings)
            setattr(output, field, result.tobytes())
            outputs.append(output)
        return outputs
