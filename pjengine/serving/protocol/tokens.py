"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pjengine.serving.protocol.base import RequestModel, ResponseModel
from pjengine.serving.protocol.chat import ChatMessage, TemplateVariables
from pjengine.serving.protocol.completions import TokenIds


class TokenizeRequest(RequestModel):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(None, description="null: true for a prompt, false for messages.")
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateVariables | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "give either prompt or messages", {"param": "prompt"})
        return self


class TokenizeResponse(ResponseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: TokenIds


class DetokenizeResponse(ResponseModel):
    prompt: str
