"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator

import msgspec
from starlette.responses import Response

from pjengine.prompts import default_params
from pjengine.request import TokenLogprobs
from pjengine.serving.context import EncodedPrompt, ServerContext
from pjengine.serving.generation import Generation, Piece
from pjengine.serving.http_io import EventStream
from pjengine.serving.logprobs import CompletionLogprobsBuilder, prompt_logprobs
from pjengine.serving.protocol.base import Usage
from pjengine.serving.protocol.completions import CompletionChoice, CompletionRequest, CompletionResponse
from pjengine.serving.responses import event_of_error, json_response

DEFAULT_MAX_TOKENS = 16


async def create_completion(context: ServerContext, body: CompletionRequest) -> Response:
    context.require_model(body.model, "generate")
    if body.logprobs is not None:
        context.require_tokenizer("logprobs")
    prompts = await context.encode_prompts(body.prompt, "prompt", body.add_special_tokens)
    if body.echo:
        prompts = [_with_text(context, prompt) for prompt in prompts]
    params = default_params(
        context.source.default_sampling,
        **body.sampling_fields(),
        logprobs=body.logprobs,
        max_tokens=_max_tokens(context, body, prompts),
    )
    if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
        params = msgspec.structs.replace(params, prompt_logprobs=body.logprobs)
    generation = await Generation.start(
        context,
        prompts,
        params,
        prompt_field="prompt",
        max_tokens_field="max_tokens",
        priority=body.priority,
        cache_salt=body.cache_salt,
    )
    answer = _Answer(context, body, generation)
    if body.stream:
        return EventStream(answer.events(), generation.close, event_of_error)
    try:
        return json_response(await answer.whole())
    finally:
        generation.close()


def _with_text(context: ServerContext, prompt: EncodedPrompt) -> EncodedPrompt:
    if prompt.text is not None:
        return prompt
    return EncodedPrompt(
        prompt.token_ids, context.require_tokenizer("echo").decode(prompt.token_ids, skip_special_tokens=True)
    )


def _max_tokens(context: ServerContext, body: CompletionRequest, prompts: list[EncodedPrompt]) -> int | None:
    """What was asked for; where nothing was, OpenAI's default as far as the window has room for it."""
    if "max_tokens" in body.model_fields_set and body.max_tokens is not None:
        return max(body.max_tokens, 1)  # 0, the prompt alone: one token is generated and not shown
    room = context.info.max_model_len - max(len(prompt.token_ids) for prompt in prompts)
    return max(1, min(DEFAULT_MAX_TOKENS, room))


class _Answer:
    """From pieces to the endpoint's answer, in one body or in events."""

    def __init__(self, context: ServerContext, body: CompletionRequest, generation: Generation):
        self._context = context
        self._body = body
        self._generation = generation
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        skip = generation.params.skip_special_tokens
        self._logprobs = (
            [
                CompletionLogprobsBuilder(context.require_tokenizer("logprobs"), skip)
                for _ in range(generation.num_choices)
            ]
            if body.logprobs is not None
            else None
        )
        self._started: set[int] = set()

    async def whole(self) -> CompletionResponse:
        pieces = await self._generation.result()
        choices = [self._choice(piece) for piece in pieces]
        if self._body.prompt_logprobs is not None:
            for choice in choices:
                prompt = choice.index // self._body.n
                ids, found = self._generation.prompts[prompt].token_ids, self._generation.prompt_logprobs[prompt]
                choice.prompt_logprobs = prompt_logprobs(self._context.tokenizer, ids, found)
        return self._response(choices, self._usage)

    async def events(self) -> AsyncGenerator[bytes]:
        async for pieces in self._generation.pieces():
            for piece in pieces:
                choice = self._choice(piece)
                if choice.text or choice.logprobs or choice.finish_reason:
                    yield self._response([choice]).model_dump_json().encode()
        if self._body.include_usage:
            yield self._response([], self._usage).model_dump_json().encode()

    @property
    def _usage(self) -> Usage:
        usage = self._generation.usage
        if self._body.max_tokens == 0:  # the token generated beyond the prompt is not shown
            return usage.model_copy(update={"completion_tokens": 0, "total_tokens": usage.prompt_tokens})
        return usage

    def _response(self, choices: list[CompletionChoice], usage: Usage | None = None) -> CompletionResponse:
        model = self._context.model_names[0]
        return CompletionResponse(id=self._id, created=self._created, model=model, choices=choices, usage=usage)

    def _choice(self, piece: Piece) -> CompletionChoice:
        """A piece as a choice; the first of a choice brings the echoed prompt."""
        choice = CompletionChoice(
            index=piece.choice, text=piece.text, finish_reason=piece.finish_reason, stop_reason=piece.stop_reason
        )
        token_ids = piece.token_ids
        logprobs: list[TokenLogprobs | None] = [*piece.logprobs]
        if self._body.max_tokens == 0:
            choice.text, token_ids, logprobs, choice.finish_reason = "", [], [], "length"
        if self._body.echo and piece.choice not in self._started:
            prompt_index = piece.choice // self._body.n
            prompt = self._generation.prompts[prompt_index]
            choice.text = (prompt.text or "") + choice.text
            if self._logprobs is not None:
                token_ids = prompt.token_ids + token_ids
                logprobs = self._generation.prompt_logprobs[prompt_index] + logprobs
        self._started.add(piece.choice)
        if self._logprobs is not None:
            choice.logprobs = self._logprobs[piece.choice].add(token_ids, logprobs)
        return choice
