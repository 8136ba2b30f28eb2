"""POST /v1/embeddings."""

from __future__ import annotations

import binascii
import time

import numpy as np
from starlette.responses import Response

from pjengine.matryoshka import check_dimensions, shorten
from pjengine.prompts import fit_tokens, with_prompt
from pjengine.serving.context import ServerContext, list_prompts, prompt_fields
from pjengine.serving.pooled import run_pooled, usage_of
from pjengine.serving.protocol.embeddings import EmbeddingRequest
from pjengine.serving.responses import arrays_response


async def create_embeddings(context: ServerContext, body: EmbeddingRequest) -> Response:
    context.require_model(body.model, "embed")
    check_dimensions(body.dimensions, context.info)
    arrival = time.monotonic()
    given = with_prompt(list_prompts(body.input, "input"), context.source.sentence, body.prompt_name)
    most = fit_tokens(body.truncate_prompt_tokens, context.info)
    prompts = await context.encode_prompts(given, "input", body.add_special_tokens, most)
    token_ids = [prompt.token_ids for prompt in prompts]
    vectors = await run_pooled(
        context,
        token_ids,
        fields=prompt_fields("input", body.input),
        priority=body.priority,
        arrival=arrival,
        input_type=body.input_type,
    )
    vectors = shorten(vectors, body.dimensions)
    encode = _base64 if body.encoding_format == "base64" else np.asarray
    return arrays_response(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": encode(vector)} for i, vector in enumerate(vectors)
            ],
            "model": context.model_names[0],
            "usage": usage_of(token_ids).model_dump(),
        }
    )


def _base64(vector: np.ndarray) -> str:
    return binascii.b2a_base64(vector.data, newline=False).decode("ascii")
