"""Every error as OpenAI's error body, with its HTTP status."""

from __future__ import annotations

import dataclasses
import http
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from pjengine.errors import DeadlineExceeded, EngineDead, EngineOverloaded, InvalidRequest
from pjengine.serving.protocol.base import ErrorDetail, ErrorResponse

logger = logging.getLogger(__name__)

MAX_REPORTED = 3  # errors of one body that the message lists
_SHOWN = 60  # characters of a value in a message


@dataclasses.dataclass
class ApiError(Exception):
    """An error with its HTTP status and the four fields of OpenAI's error body."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self) -> bytes:
        error = ErrorDetail(message=self.message, type=self.type, param=self.param, code=self.code)
        return ErrorResponse(error=error).model_dump_json().encode()

    def response(self) -> Response:
        return Response(self.body(), self.status, headers=dict(self.headers), media_type="application/json")


class GenerationError(Exception):
    """The engine ended one request with an error; the message is the engine's."""


def to_api_error(error: Exception) -> ApiError:
    """What a client is told of an exception; of a bug it is told only that there is one."""
    match error:
        case ApiError():
            return error
        case ValidationError():
            return _of_validation(error)
        case InvalidRequest():
            return ApiError(400, str(error), param=error.field, code=error.code)
        case EngineOverloaded():
            return unavailable(str(error), error.code, error.retry_after)
        case EngineDead():
            return unavailable(str(error), error.code)
        case DeadlineExceeded():
            return ApiError(504, str(error), type="timeout_error", code="deadline_exceeded")
        case GenerationError():
            return ApiError(500, str(error), type="server_error", code="generation_failed")
        case HTTPException():
            phrase = http.HTTPStatus(error.status_code).phrase
            return ApiError(
                error.status_code, error.detail, code=phrase.lower().replace(" ", "_"), headers=error.headers or {}
            )
        case _:
            return ApiError(
                500,
                "internal server error; the server's log has the details",
                type="server_error",
                code="internal_error",
            )


def unavailable(message: str, code: str, retry_after: float = 1.0) -> ApiError:
    """503 with Retry-After."""
    headers = {"retry-after": str(math.ceil(retry_after))}
    return ApiError(503, message, type="service_unavailable_error", code=code, headers=headers)


async def handle_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for all of them."""
    api_error = to_api_error(error)
    if isinstance(error, HTTPException):  # the router's 404 and 405
        api_error.message = f"{error.detail}: {request.method} {request.url.path}"
    return api_error.response()


def _of_validation(error: ValidationError) -> ApiError:
    errors = error.errors(include_url=False)
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {errors[0]['ctx']['error']}", code="invalid_json")
    by_place: dict[str, list[Any]] = {}
    for each in errors:
        by_place.setdefault(_place(each), []).append(each)
    messages = [_message(place, found) for place, found in by_place.items()]
    more = f"; and {len(messages) - MAX_REPORTED} more" if len(messages) > MAX_REPORTED else ""
    code = {
        "extra_forbidden": "unknown_parameter",
        "unsupported": "unsupported_parameter",
        "missing": "missing_required_parameter",
    }
    return ApiError(
        400,
        "; ".join(messages[:MAX_REPORTED]) + more,
        param=next(iter(by_place)) or None,
        code=code.get(errors[0]["type"], "invalid_value"),
    )


def _place(error: Any) -> str:
    """The field at fault, as `messages[0].role`."""
    location: Sequence[int | str] = error["loc"]
    param = error.get("ctx", {}).get("param")
    place = ""
    for part in (*location, param) if param else location:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not part.startswith("<"):  # the tag of a union's member
            place += f".{part}" if place else part
    return place


def _message(place: str, errors: list[Any]) -> str:
    if errors[0]["type"] == "extra_forbidden":
        return f"{place}: unknown parameter"
    if not place:
        return f"the body: {errors[0]['msg']}"
    said = " or ".join(dict.fromkeys(error["msg"] for error in errors))
    value = errors[0]["input"]
    if errors[0]["msg"].startswith("Input should") and isinstance(value, (int, float, str)):
        said += f", got {value[:_SHOWN] if isinstance(value, str) else value!r:.{_SHOWN}}"
    return f"{place}: {said}"
