"""POST /v1/classify."""

from __future__ import annotations

import time
import uuid

from starlette.responses import Response

from pjengine.activations import activate
from pjengine.prompts import fit_tokens
from pjengine.serving.context import ServerContext, prompt_fields
from pjengine.serving.pooled import run_pooled, usage_of
from pjengine.serving.protocol.scoring import Classification, ClassifyRequest, ClassifyResponse
from pjengine.serving.responses import json_response


async def create_classification(context: ServerContext, body: ClassifyRequest) -> Response:
    context.require_model(body.model, "classify")
    arrival = time.monotonic()
    most = fit_tokens(body.truncate_prompt_tokens, context.info)
    prompts = await context.encode_prompts(body.input, "input", body.add_special_tokens, most)
    token_ids = [prompt.token_ids for prompt in prompts]
    fields = prompt_fields("input", body.input)
    logits = await run_pooled(context, token_ids, fields=fields, priority=body.priority, arrival=arrival)
    info = context.info
    scores = activate(logits, info.activation) if body.use_activation else logits
    return json_response(
        ClassifyResponse(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=context.model_names[0],
            data=[
                Classification(index=i, label=info.labels[best], probs=probs, num_classes=len(probs))
                for i, (best, probs) in enumerate(zip(logits.argmax(-1).tolist(), scores.tolist(), strict=True))
            ],
            usage=usage_of(token_ids),
        )
    )
