"""Many requests through an engine in this process: fed as it takes them, counted on a bar, none left behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
from tqdm import tqdm

from pjengine.embedding_engine import EmbeddingEngine
from pjengine.engine import Engine
from pjengine.errors import EngineOverloaded, PJEngineError
from pjengine.interrupts import deferred_interrupts
from pjengine.request import Output, Request

FEED = 512  # requests added between two steps


def run_requests(
    engine: Engine | EmbeddingEngine, requests: Sequence[Request], receive: Callable[[int, Output], bool]
) -> None:
    """Runs requests, as many at a time as the engine takes, until all have finished.

    However it ends, by an error or Ctrl-C too, none of them is left in the engine.

    Args:
      receive: gets (index of the request, what it gained) and says whether that sequence must be aborted now.
    """
    index: dict[str, int] = {}
    try:
        with deferred_interrupts() as check_interrupt:
            while len(index) < len(requests) or engine.has_work:
                _feed(engine, requests, index)
                for output in engine.step():
                    i = index.get(output.request_id)
                    if i is not None and receive(i, output):
                        engine.abort(output.request_id, output.index)
                check_interrupt()
    finally:
        for request_id in index:
            engine.abort(request_id)


def run_pooled(
    engine: Engine | EmbeddingEngine, requests: Sequence[Request], what: str, field: str, show: bool
) -> np.ndarray:
    """The embeddings or logits of requests, in order: float32 [requests, elements].

    Args:
      what: the bar's title; show: it.
      field: how the user spells the requests, for errors.
    Raises:
      PJEngineError: the engine failed on one of them.
    """
    found = np.zeros((len(requests), engine.info.embedding_size or len(engine.info.labels)), np.float32)
    with Progress(len(requests), what, show) as progress:

        def receive(i: int, output: Output) -> bool:
            vector = output.embedding if output.logits is None else output.logits
            if vector is None:
                raise PJEngineError(f"{field}[{i}]: {output.error or 'the engine gave no result'}")
            found[i] = np.frombuffer(vector, "<f4")
            progress.advance(len(requests[i].prompt_token_ids), 0)
            return False

        run_requests(engine, requests, receive)
    return found


def _feed(engine: Engine | EmbeddingEngine, requests: Sequence[Request], index: dict[str, int]) -> None:
    """Adds some requests, fewer where the engine's queue is full; enters them in `index`.

    Not all at once: the device would wait for the last to be added.
    """
    for request in requests[len(index) : len(index) + FEED]:
        try:
            engine.add(request)
        except EngineOverloaded:
            if not engine.has_work:
                raise  # it will never fit
            return
        index[request.request_id] = len(index)


class Progress:
    """A bar over requests, with token rates; `advance` counts one request."""

    def __init__(self, total: int, what: str, shown: bool):
        self._bar = tqdm(total=total, desc=what, unit="req", dynamic_ncols=True, disable=not shown)
        self._start = time.monotonic()
        self._tokens_in = 0
        self._tokens_out = 0

    def advance(self, tokens_in: int, tokens_out: int) -> None:
        self._tokens_in += tokens_in
        self._tokens_out += tokens_out
        if not self._bar.disable:
            seconds = max(time.monotonic() - self._start, 1e-9)
            rates = f"in {self._tokens_in / seconds:.0f} tok/s, out {self._tokens_out / seconds:.0f} tok/s"
            self._bar.set_postfix_str(rates, refresh=False)
        self._bar.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
