"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.responses import Response

from pjengine.prompts import default_params
from pjengine.serving.context import EncodedPrompt, ServerContext
from pjengine.serving.generation import Generation, Piece
from pjengine.serving.http_io import EventStream
from pjengine.serving.logprobs import chat_logprobs, prompt_logprobs
from pjengine.serving.protocol.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatLogprobs,
    ChatMessage,
    Delta,
)
from pjengine.serving.responses import event_of_error, json_response


async def create_chat_completion(context: ServerContext, body: ChatCompletionRequest) -> Response:
    context.require_model(body.model, "generate")
    prompt = await encode_chat(
        context, body.messages, body.add_generation_prompt, body.add_special_tokens, body.chat_template_kwargs or {}
    )
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params = default_params(
        context.source.default_sampling,
        **body.sampling_fields(),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        max_tokens=max_tokens if max_tokens is not None else max(1, context.info.max_model_len - len(prompt.token_ids)),
    )
    generation = await Generation.start(
        context,
        [prompt],
        params,
        prompt_field="messages",
        max_tokens_field="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
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


async def encode_chat(
    context: ServerContext,
    messages: Sequence[ChatMessage],
    add_generation_prompt: bool,
    add_special_tokens: bool,
    template_options: dict[str, Any],
) -> EncodedPrompt:
    """The conversation through the model's chat template.

    Raises:
      InvalidRequest: the model has no template, or it refuses these messages.
    """
    tokenizer = context.require_tokenizer("messages")
    text = tokenizer.apply_chat_template(
        [message.for_template() for message in messages],
        add_generation_prompt=add_generation_prompt,
        **template_options,
    )
    return EncodedPrompt(await context.encode(text, "messages", add_special_tokens), text)


class _Answer:
    """From pieces to the endpoint's answer, in one body or in events."""

    def __init__(self, context: ServerContext, body: ChatCompletionRequest, generation: Generation):
        self._context = context
        self._body = body
        self._generation = generation
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def whole(self) -> ChatCompletionResponse:
        choices = [
            ChatChoice(
                index=piece.choice,
                message=AssistantMessage(content=piece.text),
                logprobs=self._logprobs(piece),
                finish_reason=piece.finish_reason,
                stop_reason=piece.stop_reason,
            )
            for piece in await self._generation.result()
        ]
        answer = ChatCompletionResponse(
            id=self._id,
            created=self._created,
            model=self._context.model_names[0],
            choices=choices,
            usage=self._generation.usage,
        )
        if self._body.prompt_logprobs is not None:
            ids, found = self._generation.prompts[0].token_ids, self._generation.prompt_logprobs[0]
            answer.prompt_logprobs = prompt_logprobs(self._context.tokenizer, ids, found)
        return answer

    async def events(self) -> AsyncGenerator[bytes]:
        for index in range(self._body.n):
            yield self._event(
                ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""), finish_reason=None)
            )
        async for pieces in self._generation.pieces():
            for piece in pieces:
                logprobs = self._logprobs(piece)
                if piece.text or logprobs or piece.finish_reason:
                    yield self._event(
                        ChatChunkChoice(
                            index=piece.choice,
                            delta=Delta(content=piece.text) if piece.text or logprobs else Delta(),
                            logprobs=logprobs,
                            finish_reason=piece.finish_reason,
                            stop_reason=piece.stop_reason,
                        )
                    )
        if self._body.include_usage:
            yield self._event(None)

    def _event(self, choice: ChatChunkChoice | None) -> bytes:
        """A choice's news, or the usage at the end."""
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._context.model_names[0],
            choices=[] if choice is None else [choice],
            usage=self._generation.usage if choice is None else None,
        )
        return chunk.model_dump_json(exclude_unset=True).encode()  # a delta holds only what is new

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not self._body.logprobs or not piece.token_ids:
            return None
        return chat_logprobs(self._context.require_tokenizer("logprobs"), piece.token_ids, piece.logprobs)
