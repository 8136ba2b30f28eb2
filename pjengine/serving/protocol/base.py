"""What all request and response models share."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError


class RequestModel(BaseModel):
    """A request's body: types are not converted, and a field we do not know is an error, not a typo passed over."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class ResponseModel(BaseModel):
    """A response's body."""


class Usage(ResponseModel):
    """Tokens of one HTTP request."""

    class PromptTokensDetails(ResponseModel):
        cached_tokens: int

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class ErrorDetail(ResponseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(ResponseModel):
    """OpenAI's error body."""

    error: ErrorDetail


def _refuse(value: Any) -> Any:
    if value is not None:
        raise PydanticCustomError("unsupported", "is not supported by this server; leave it out")
    return value


# A string, or a list of something: the tags, which errors leave out, are those of the value's own type.
STRING, LIST = Tag("<string>"), Tag("<list>")
STRING_OR_LIST = Discriminator(
    lambda value: "<string>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None,
    custom_error_type="string_or_list",
    custom_error_message="should be a string or a list",
)
FinishReason: TypeAlias = Literal["stop", "length"]
Ignored: TypeAlias = Annotated[Any, Field(description="Accepted; has no effect.")]
Unsupported: TypeAlias = Annotated[Any, AfterValidator(_refuse), Field(description="Refused unless null.")]
