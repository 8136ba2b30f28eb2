"""Collector: one request's outputs as they come from the engine, put together into what the user gets."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import msgspec

from pjengine.detokenizer import Detokenizer
from pjengine.outputs import CompletionOutput, RequestOutput
from pjengine.request import Output, Timings, TokenLogprobs
from pjengine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pjengine.tokenizer import Tokenizer


@dataclasses.dataclass
class _Sequence:
    """One of a request's sequences, so far."""

    index: int
    text: str = ""
    detokenizer: Detokenizer | None = None  # while tokens come and there are stop strings to find
    unspelled: list[int] = dataclasses.field(default_factory=list)  # tokens whose text is not in `text` yet
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    timings: Timings | None = None
    arrival: float = 0.0  # on time.monotonic's clock


class Collector:
    """Gathers what one request generates; finds its stop strings.

    Args:
      prompt: its text; None where token ids were given.
      token_ids: its tokens.
      params: how it is sampled.
      tokenizer: None for a model without one: texts are "" then.
    """

    def __init__(self, prompt: str | None, token_ids: list[int], params: SamplingParams, tokenizer: Tokenizer | None):
        self.prompt = prompt
        self.token_ids = token_ids
        self.params = params
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self._tokenizer = tokenizer
        self._sequences = [_Sequence(index) for index in range(params.n)]

    @property
    def finished(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self._sequences)

    @property
    def generated_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self._sequences)

    def add(self, output: Output) -> bool:
        """Takes what one step added. True: a stop string ended this sequence, so the engine must abort it."""
        sequence = self._sequences[output.index]
        if sequence.finish_reason is not None:
            return False  # generated before the engine learned of the stop string
        if output.index == 0:
            self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
            self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        sequence.token_ids += output.token_ids
        sequence.logprobs += output.logprobs or ()
        if output.timings is not None:
            sequence.timings = output.timings
            sequence.arrival = time.monotonic() - output.timings.finished
        sequence.finish_reason, sequence.stop_reason = output.finish_reason, output.stop_reason
        sequence.error = output.error
        return self._tokenizer is not None and self._add_text(sequence, output, self._tokenizer)

    def _add_text(self, sequence: _Sequence, output: Output, tokenizer: Tokenizer) -> bool:
        finished = output.finish_reason is not None
        sequence.unspelled += output.token_ids
        if output.finish_reason == "stop" and not self.params.include_stop_str_in_output:
            sequence.unspelled.pop()  # the stop token is no part of the text
        if not self.params.stop and not finished:
            return False  # nobody reads the text before its end: spelling it at once is quicker
        if sequence.detokenizer is None:
            sequence.detokenizer = Detokenizer.make(tokenizer, self.token_ids, self.params)
        text, stopped = sequence.detokenizer.push(sequence.unspelled, finished)
        sequence.text += text
        sequence.unspelled = []
        if finished or stopped is not None:
            sequence.detokenizer = None
        if stopped is None:
            return False
        sequence.finish_reason, sequence.stop_reason = "stop", stopped
        if sequence.timings is not None:
            sequence.timings = msgspec.structs.replace(sequence.timings, finished=time.monotonic() - sequence.arrival)
        return not finished

    def result(self) -> RequestOutput:
        """The finished request. RuntimeError if it is not finished."""
        return RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=self.token_ids,
            outputs=[self._completion(sequence) for sequence in self._sequences],
            prompt_logprobs=self.prompt_logprobs,
            timings=_joined([sequence.timings for sequence in self._sequences if sequence.timings]),
            cached_tokens=self.cached_tokens,
        )

    def _completion(self, sequence: _Sequence) -> CompletionOutput:
        if sequence.finish_reason is None:
            raise RuntimeError(f"sequence {sequence.index} is not finished")
        return CompletionOutput(
            index=sequence.index,
            text=sequence.text,
            token_ids=sequence.token_ids,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            logprobs=sequence.logprobs if self.params.logprobs is not None else None,
            error=sequence.error,
        )


def _joined(timings: list[Timings]) -> Timings | None:
    """From the first sequence to start to the last to finish."""
    if not timings:
        return None
    return Timings(
        queued=min(t.queued for t in timings),
        first_token=min(t.first_token for t in timings),
        finished=max(t.finished for t in timings),
    )
