"""Bodies from response models."""

from __future__ import annotations

from typing import Any

import orjson
from pydantic import BaseModel
from starlette.responses import Response

from pjengine.serving.errors import logger, to_api_error


def json_response(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")


def arrays_response(fields: dict[str, Any]) -> Response:
    """Of plain data and float32 arrays, whose numbers are written as short as they read back the same."""
    return Response(orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def event_of_error(error: Exception) -> bytes:
    """The event that ends a stream that failed; clients of OpenAI's API raise it."""
    api_error = to_api_error(error)
    if api_error.code == "internal_error":
        logger.error("a stream failed", exc_info=error)
    return api_error.body()
