"""What the endpoints of models that embed, score or classify share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from pjengine.serving.protocol.base import Ignored, RequestModel
from pjengine.serving.protocol.completions import Prompt

MAX_INPUTS = 2048  # texts of one request, as at OpenAI


def _at_most(value: Any) -> Any:
    if isinstance(value, list) and value and not isinstance(value[0], int) and len(value) > MAX_INPUTS:
        raise PydanticCustomError(
            "too_many", "has {found} inputs; send at most {most} a request", {"found": len(value), "most": MAX_INPUTS}
        )
    return value


PromptInput = Annotated[Prompt, AfterValidator(_at_most)]


class PoolingRequest(RequestModel):
    model: str | None = Field(None, description="A name that /v1/models lists; null: the model that is served.")
    truncate_prompt_tokens: int | None = Field(
        None,
        description="Longer inputs lose their end: -1, beyond the model's window; N, beyond N tokens. null: refused.",
    )
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="Lower runs first.")
    user: Ignored = None
