"""From token ids to the vectors of an engine that embeds or classifies: what its endpoints share."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Literal

import numpy as np

from pjengine.errors import InvalidRequest
from pjengine.request import Request
from pjengine.request_checks import check_prompt
from pjengine.serving.context import ServerContext
from pjengine.serving.errors import GenerationError
from pjengine.serving.protocol.base import Usage


def usage_of(token_ids: Sequence[Sequence[int]]) -> Usage:
    tokens = sum(map(len, token_ids))
    return Usage(prompt_tokens=tokens, total_tokens=tokens)


async def run_pooled(
    context: ServerContext,
    token_ids: Sequence[list[int]],
    *,
    fields: Sequence[str],
    priority: int,
    arrival: float,
    input_type: Literal["query", "document"] = "query",
    token_type_ids: Sequence[list[int] | None] | None = None,
) -> np.ndarray:
    """Each input's embedding or logits, in order: float32 [inputs, elements].

    Args:
      fields: where the user gave each input, for errors.
      arrival: of the HTTP request, `time.monotonic()`.
      token_type_ids: segments of each input's tokens.
    Raises:
      InvalidRequest, EngineOverloaded, EngineDead: the engine does not take them.
      GenerationError: the engine failed on one of them; the others are aborted.
    """
    if len(token_ids) > context.max_waiting:  # all are taken or none: these never could be
        raise InvalidRequest(
            f"{len(token_ids)} inputs, but at most {context.max_waiting} may wait here (--max-waiting); "
            "send fewer in a request",
            code="too_many_inputs",
        )
    shared = uuid.uuid4().hex
    types = token_type_ids or [None] * len(token_ids)
    requests = []
    for i, (ids, segments, field) in enumerate(zip(token_ids, types, fields, strict=True)):
        check_prompt(ids, context.info, field=field)
        requests.append(
            Request(
                request_id=f"{shared}.{i}",
                prompt_token_ids=ids,
                token_type_ids=segments,
                input_type=input_type,
                priority=priority,
                arrival_time=arrival,
            )
        )
    found: dict[str, bytes] = {}
    submission = await context.client.submit(requests)
    running = len(requests)
    try:
        async for arrived in submission:
            for output, now in arrived:
                timer = context.metrics.timer(arrival)
                running -= 1
                vector = output.embedding if output.logits is None else output.logits
                if vector is None:
                    timer.end("error", now)
                    raise GenerationError(output.error or f"the engine ended the request: {output.finish_reason}")
                found[output.request_id] = vector
                timer.output(output, now)
                timer.end("stop", now)
    finally:
        submission.close()
        for _ in range(running):
            context.metrics.finished("abort")
    joined = b"".join([found[request.request_id] for request in requests])
    return np.frombuffer(joined, "<f4").reshape(len(requests), -1)
