"""POST /tokenize and /detokenize."""

from __future__ import annotations

from starlette.responses import Response

from pjengine.request_checks import check_token_ids
from pjengine.serving.context import ServerContext
from pjengine.serving.logprobs import token_string
from pjengine.serving.protocol.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from pjengine.serving.responses import json_response
from pjengine.serving.routes.chat import encode_chat


async def tokenize(context: ServerContext, body: TokenizeRequest) -> Response:
    context.require_model(body.model)
    add_special_tokens = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    if body.messages is not None:
        options = body.chat_template_kwargs or {}
        ids = (
            await encode_chat(context, body.messages, body.add_generation_prompt, add_special_tokens, options)
        ).token_ids
    else:
        ids = await context.encode(body.prompt or "", "prompt", add_special_tokens)
    strings = (
        [token_string(context.require_tokenizer("prompt"), token) for token in ids] if body.return_token_strs else None
    )
    return json_response(
        TokenizeResponse(count=len(ids), max_model_len=context.info.max_model_len, tokens=ids, token_strs=strings)
    )


async def detokenize(context: ServerContext, body: DetokenizeRequest) -> Response:
    context.require_model(body.model)
    check_token_ids(body.tokens, context.info.vocab_size, field="tokens")
    tokenizer = context.require_tokenizer("tokens")
    return json_response(DetokenizeResponse(prompt=tokenizer.decode(body.tokens, skip_special_tokens=False)))
