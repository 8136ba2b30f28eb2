"""The text of one HTTP request as the engine generates it: what completions and chat are made from."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence

from pjengine.detokenizer import Detokenizer
from pjengine.errors import InvalidRequest
from pjengine.prompts import engine_params
from pjengine.request import Output, Request, TokenLogprobs
from pjengine.request_checks import check_max_tokens, check_prompt
from pjengine.sampling_params import SamplingParams
from pjengine.serving.context import EncodedPrompt, ServerContext
from pjengine.serving.engine_client import Submission
from pjengine.serving.errors import GenerationError
from pjengine.serving.metrics import SequenceTimer
from pjengine.serving.protocol.base import FinishReason, Usage
from pjengine.tokenizer import Tokenizer

# Of an engine; any other reason is an error.
_FINISH_REASONS: Mapping[str | None, FinishReason | None] = {None: None, "stop": "stop", "length": "length"}


@dataclasses.dataclass
class Piece:
    """What is new of one choice.

    Attributes:
      choice: its index: `n` choices of the first prompt, then those of the next.
      text: new text; empty while characters are incomplete or a stop string may be on its way.
      token_ids, logprobs: of the new tokens; `logprobs` is empty where none were asked for.
      finish_reason: "stop" or "length" with the last piece.
      stop_reason: the stop string or stop token id that ended it.
    """

    choice: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def extend(self, later: Piece) -> None:
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


class _Choice:
    """One sequence: from its outputs to pieces of text."""

    def __init__(
        self,
        index: int,
        prompt: EncodedPrompt,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        timer: SequenceTimer,
    ):
        self.index = index
        self.finished = False
        self._include_stop = params.include_stop_str_in_output
        self._detokenizer = Detokenizer.make(tokenizer, prompt.token_ids, params) if tokenizer else None
        self._timer = timer

    def piece(self, output: Output, now: float) -> Piece:
        if output.finish_reason not in _FINISH_REASONS:
            self.finished = True
            self._timer.end("error", now)
            raise GenerationError(output.error or f"the engine ended the request: {output.finish_reason}")
        reason = _FINISH_REASONS[output.finish_reason]
        piece = Piece(self.index, "", output.token_ids, output.logprobs or [], reason, output.stop_reason)
        if self._detokenizer is not None:
            spelled = output.token_ids
            if output.finish_reason == "stop" and not self._include_stop:
                spelled = spelled[:-1]  # the stop token is no part of the text
            piece.text, stopped = self._detokenizer.push(spelled, finished=output.finish_reason is not None)
            if stopped is not None:
                piece.finish_reason, piece.stop_reason = "stop", stopped
        self._timer.output(output, now)
        if piece.finish_reason is not None:
            self.finished = True
            self._timer.end(piece.finish_reason, now)
        return piece


class Generation:
    """One HTTP request's prompts in the engine. `close` it when nobody reads on: what still runs is aborted.

    Attributes:
      prompts: as given; params: of each of them.
      prompt_logprobs: by prompt, known with its first piece, where asked for.
    """

    def __init__(
        self,
        context: ServerContext,
        submission: Submission,
        prompts: Sequence[EncodedPrompt],
        params: SamplingParams,
        arrival: float,
    ):
        self.prompts = prompts
        self.params = params
        self.prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        self._submission = submission
        self._metrics = context.metrics
        self._prompt_index = {request_id: i for i, request_id in enumerate(submission.request_ids)}
        self._cached_tokens = [0] * len(prompts)
        self._generated_tokens = 0
        self._choices = [
            _Choice(index, prompts[index // params.n], params, context.tokenizer, context.metrics.timer(arrival))
            for index in range(len(prompts) * params.n)
        ]

    @classmethod
    async def start(
        cls,
        context: ServerContext,
        prompts: Sequence[EncodedPrompt],
        params: SamplingParams,
        *,
        prompt_field: str,
        max_tokens_field: str,
        priority: int,
        cache_salt: str | None,
    ) -> Generation:
        """Checks the prompts and hands them to the engine.

        Args:
          prompt_field, max_tokens_field: how the user spells them, for errors.
        Raises:
          InvalidRequest, EngineOverloaded, EngineDead: the engine does not take them.
        """
        arrival = time.monotonic()
        params = engine_params(params, context.info, context.tokenizer)
        for prompt in prompts:
            check_prompt(prompt.token_ids, context.info, field=prompt_field)
            check_max_tokens(params, len(prompt.token_ids), context.info, field=max_tokens_field)
        sequences, most = len(prompts) * params.n, context.info.max_num_seqs + context.max_waiting
        if sequences > most:  # all are taken or none: these never could be
            raise InvalidRequest(
                f"{sequences} sequences, but at most {most} may run and wait here (--max-num-seqs, --max-waiting); "
                "send fewer in a request",
                code="too_many_inputs",
            )
        requests = [
            Request(
                request_id=uuid.uuid4().hex,
                prompt_token_ids=prompt.token_ids,
                params=params,
                priority=priority,
                cache_salt=cache_salt,
                arrival_time=arrival,
            )
            for prompt in prompts
        ]
        return cls(context, await context.client.submit(requests), prompts, params, arrival)

    async def pieces(self) -> AsyncGenerator[list[Piece]]:
        """Yields what is new, at most one piece per choice at a time, until every choice has finished.

        Raises:
          EngineDead, GenerationError: the engine or this request failed.
        """
        async for arrived in self._submission:
            new: dict[int, Piece] = {}
            for output, now in arrived:
                prompt = self._prompt_index[output.request_id]
                choice = self._choices[prompt * self.params.n + output.index]
                if choice.finished:
                    continue  # generated before the engine learned of the stop string
                self._count(prompt, output)
                piece = choice.piece(output, now)
                if choice.index in new:
                    new[choice.index].extend(piece)
                else:
                    new[choice.index] = piece
                if piece.finish_reason is not None and output.finish_reason is None:
                    self._submission.end(output.request_id, output.index)
            if new:
                yield list(new.values())

    async def result(self) -> list[Piece]:
        """Waits for the end; returns each choice in one piece."""
        whole = [Piece(choice.index) for choice in self._choices]
        async for pieces in self.pieces():
            for piece in pieces:
                whole[piece.choice].extend(piece)
        return whole

    def close(self) -> None:
        for choice in self._choices:
            if not choice.finished:
                choice.finished = True
                self._metrics.finished("abort")
        self._submission.close()

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._generated_tokens,
            total_tokens=prompt_tokens + self._generated_tokens,
            prompt_tokens_details=Usage.PromptTokensDetails(cached_tokens=sum(self._cached_tokens)),
        )

    def _count(self, prompt: int, output: Output) -> None:
        self._generated_tokens += len(output.token_ids)
        if output.index == 0:
            self._cached_tokens[prompt] = max(self._cached_tokens[prompt], output.cached_tokens)
            if output.prompt_logprobs is not None:
                self.prompt_logprobs[prompt] = output.prompt_logprobs
