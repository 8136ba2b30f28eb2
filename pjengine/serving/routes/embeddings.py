"""POST /v1/embeddings."""

from __future__ import annotations

import array
import base64
import sys
import time
import uuid

from starlette.responses import Response

from pjengine.request import Request
from pjengine.request_checks import check_prompt
from pjengine.serving.context import ServerContext
from pjengine.serving.errors import GenerationError
from pjengine.serving.protocol.base import Usage
from pjengine.serving.protocol.embeddings import Embedding, EmbeddingRequest, EmbeddingResponse
from pjengine.serving.responses import json_response


async def create_embeddings(context: ServerContext, body: EmbeddingRequest) -> Response:
    context.require_model(body.model, "embed")
    arrival = time.monotonic()
    prompts = await context.encode_prompts(body.input, "input", body.add_special_tokens)
    for prompt in prompts:
        check_prompt(prompt.token_ids, context.info, field="input")
    requests = [
        Request(
            request_id=uuid.uuid4().hex, prompt_token_ids=prompt.token_ids, priority=body.priority, arrival_time=arrival
        )
        for prompt in prompts
    ]
    vectors = await _embed(context, requests, arrival)
    encode = _floats if body.encoding_format == "float" else _base64
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    return json_response(
        EmbeddingResponse(
            data=[Embedding(index=i, embedding=encode(vector)) for i, vector in enumerate(vectors)],
            model=context.model_names[0],
            usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        )
    )


async def _embed(context: ServerContext, requests: list[Request], arrival: float) -> list[bytes]:
    """Each request's vector, in order.

    Raises:
      GenerationError: the engine failed on one of them; the others are aborted.
    """
    vectors: dict[str, bytes] = {}
    submission = await context.client.submit(requests)
    try:
        async for arrived in submission:
            for output, now in arrived:
                if output.embedding is None:
                    raise GenerationError(output.error or f"the engine ended the request: {output.finish_reason}")
                vectors[output.request_id] = output.embedding
                context.metrics.timer(arrival).end("stop", now)
    finally:
        submission.close()
    return [vectors[request.request_id] for request in requests]


def _floats(vector: bytes) -> list[float]:
    values = array.array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode("ascii")
