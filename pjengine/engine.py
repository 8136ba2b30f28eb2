"""Engine: schedule, run, update. Token ids in, token ids out."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import numpy as np

from pjengine.engine_info import EngineInfo
from pjengine.errors import EngineOverloaded, InvalidRequest
from pjengine.kv_cache import PageCopy
from pjengine.metrics import Stats
from pjengine.request import Output, Request, Timings, TokenLogprobs
from pjengine.request_checks import check_max_tokens, check_params, check_prompt, check_token_types
from pjengine.sampling_params import SamplingParams
from pjengine.scheduler import Batch, Row, Scheduler
from pjengine.sequence import Sequence, Status


@dataclasses.dataclass(frozen=True)
class StepResult:
    """A step's samples on the host. Logprob entries are None where no row asked."""

    tokens: np.ndarray  # int32 [rows]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: dict[int, list[TokenLogprobs]]  # row -> of the tokens after each of the row's positions


class Step(Protocol):
    """A step on its way; `read` waits for the device. bucket_tokens: of the compiled shape it runs in."""

    @property
    def bucket_tokens(self) -> int: ...
    def read(self) -> StepResult: ...


class Runner(Protocol):
    """Runs planned steps in the order they come. `dispatch` does not wait for the device."""

    def dispatch(self, batch: Batch, copies: SequenceOf[PageCopy]) -> Step: ...


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread calls it.

    The device never waits for the host: while a step runs, the next one is scheduled and dispatched; its unknown input
    tokens are read from a device table. So the host learns a step's tokens one call of `step` late, and what was
    computed past a
    stop is dropped.
    """

    def __init__(self, info: EngineInfo, scheduler: Scheduler, runner: Runner, max_waiting: int = 16384, seed: int = 0):
        self.info = info
        self.scheduler = scheduler
        self.runner = runner
        self.max_waiting = max_waiting
        self._eos = frozenset(info.eos_token_ids)
        self._eos_array = np.array(info.eos_token_ids, np.int32)
        self._requests: dict[str, dict[int, Sequence]] = {}
        self._arrivals = itertools.count()
        self._seeds = random.Random(seed)
        self._in_flight: tuple[Batch, Step] | None = None
        self._generated = 0
        self._steps = 0
        self._step_tokens = 0
        self._padded_tokens = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._in_flight is not None

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
          InvalidRequest: it cannot run on this model; no other request is affected.
          EngineOverloaded: `max_waiting` sequences wait already, beside those that run or have a place to.
        """
        params = self._check(request)
        prompt = request.prompt_token_ids
        running, waiting = len(self.scheduler.running), self.scheduler.num_waiting
        if running + waiting + params.n > self.max_waiting + self.scheduler.max_num_seqs:
            raise EngineOverloaded(
                f"{running} sequences are running and {waiting} waiting (max_waiting: {self.max_waiting}); retry later"
            )
        max_tokens = params.max_tokens or self.info.max_model_len - len(prompt)
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        arrival = next(self._arrivals)
        parent = None
        sequences = {}
        for index in range(params.n):
            sequences[index] = seq = Sequence(
                request=request,
                params=params,
                index=index,
                order=(request.priority, arrival, index),
                max_total=len(prompt) + max_tokens,
                seed=(seed + index) % 2**64,
                arrival=request.arrival_time if request.arrival_time is not None else time.monotonic(),
                parent=parent,
            )
            parent = parent or seq
            self.scheduler.add(seq)
        self._requests[request.request_id] = sequences

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its sequences, and frees its pages. Unknown ids are ignored: it may just have
        finished.
        """
        sequences = self._requests.get(request_id, {})
        for i in [index] if index is not None else list(sequences):
            if i in sequences:
                self._finish(sequences[i])

    def step(self) -> list[Output]:
        """One round; returns what the sequences gained by the step before.

        Raises: what the runner does, out of memory, say. Requests that were running are to be aborted then; others, and
          new ones, are served as ever.
        """
        try:
            return self._step()
        except BaseException:
            # Pages are offered to the prefix cache when their step is planned, and this one may not have written them.
            self.scheduler.cache.forget()
            self._in_flight = None
            raise

    def stats(self) -> Stats:
        scheduler, pools = self.scheduler, self.scheduler.cache.pools
        used, total = sum(p.num_used for p in pools), sum(p.num_pages - 1 for p in pools)
        return Stats(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            kv_usage=used / total if total else 0.0,
            used_pages=used,
            total_pages=total,
            cached_pages=sum(p.num_cached for p in pools),
            prefix_cache_queries=scheduler.prefix_queries,
            prefix_cache_hits=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            generation_tokens=self._generated,
            steps=self._steps,
            step_tokens=self._step_tokens,
            padded_tokens=self._padded_tokens,
        )

    def check_integrity(self) -> None:
        """Raises RuntimeError if a page or slot leaked, is shared wrongly or is lost."""
        self.scheduler.check_integrity()

    # -- parts -------------------------------------------------------------------------------------------------------

    def _step(self) -> list[Output]:
        batch = self.scheduler.schedule()
        started = None
        if batch is not None:
            started = batch, self.runner.dispatch(batch, self.scheduler.cache.take_copies())
            self._steps += 1
            self._step_tokens += batch.num_tokens
            self._padded_tokens += started[1].bucket_tokens
        finished, self._in_flight = self._in_flight, started
        return self._update(*finished) if finished else []

    def _check(self, request: Request) -> SamplingParams:
        info, params, prompt = self.info, request.params, request.prompt_token_ids
        if params is None:
            raise InvalidRequest(
                f"model: {info.model} generates text and neither embeds nor classifies; start it with --task embed or "
                "classify, or use another model",
                field="model",
            )
        if request.request_id in self._requests:
            raise InvalidRequest(f"request_id: {request.request_id!r} is in use by an open request", field="request_id")
        check_prompt(prompt, info)
        check_token_types(request, info)
        check_max_tokens(params, len(prompt), info)
        check_params(params, info)
        return params

    def _finish(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        sequences = self._requests[seq.request.request_id]
        del sequences[seq.index]
        if not sequences:
            del self._requests[seq.request.request_id]

    def _update(self, batch: Batch, step: Step) -> list[Output]:
        result = step.read()
        for r, found in result.prompt_logprobs.items():
            _collect_prompt_logprobs(batch.row(r), found)
        rows = np.flatnonzero(batch.samples)
        # All others gain one token and nothing else.
        special = batch.watched | np.isin(result.tokens, self._eos_array)
        outputs = []
        for r, token, careful in zip(rows.tolist(), result.tokens[rows].tolist(), special[rows].tolist(), strict=True):
            seq = batch.seqs[r]
            if seq.status is Status.FINISHED:
                continue  # aborted, or past its stop
            if careful:
                outputs.append(self._append(seq, token, result.logprobs[r] if result.logprobs else None))
            else:
                seq.tokens.append(token)
                outputs.append(Output(request_id=seq.request.request_id, index=seq.index, token_ids=[token]))
        self._generated += len(outputs)
        return outputs

    def _append(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None) -> Output:
        seq.tokens.append(token)
        output = Output(request_id=seq.request.request_id, index=seq.index, token_ids=[token])
        if logprobs is not None and seq.params.logprobs is not None:
            output.logprobs = [TokenLogprobs(logprobs.token, logprobs.rank, logprobs.top[: seq.params.logprobs])]
        first = seq.first_token is None
        if seq.first_token is None:
            seq.first_token = seq.seconds()
            output.cached_tokens = seq.cached_tokens
            if seq.params.prompt_logprobs is not None and seq.prompt_len == 1:
                seq.prompt_logprobs = [None]  # nothing stands before the only token
            output.prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, None
        output.finish_reason, output.stop_reason = self._stop(seq, token)
        if first or output.finish_reason is not None:
            queued = seq.first_scheduled - seq.arrival if seq.first_scheduled is not None else 0.0
            output.timings = Timings(queued=queued, first_token=seq.first_token, finished=seq.seconds())
        if output.finish_reason is not None:
            self._finish(seq)
        return output

    def _stop(self, seq: Sequence, token: int) -> tuple[str | None, int | None]:
        params = seq.params
        if token in params.stop_token_ids and seq.num_output >= params.min_tokens:
            return "stop", token
        if token in self._eos and not params.ignore_eos and seq.num_output >= params.min_tokens:
            return "stop", None
        return ("length", None) if len(seq.tokens) >= seq.max_total else (None, None)


def _collect_prompt_logprobs(row: Row, found: list[TokenLogprobs]) -> None:
    """Position p predicts token p + 1. A recomputed position says the same again."""
    seq = row.seq
    if seq.prompt_logprobs is None:
        seq.prompt_logprobs = [None] * seq.prompt_len
    k = seq.params.prompt_logprobs
    for position, logprobs in enumerate(found, row.start + 1):
        if position < seq.prompt_len:
            seq.prompt_logprobs[position] = TokenLogprobs(logprobs.token, logprobs.rank, logprobs.top[:k])
