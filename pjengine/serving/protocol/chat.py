"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pjengine.sampling_params import MAX_LOGPROBS
from pjengine.serving.protocol.base import (
    LIST,
    STRING,
    STRING_OR_LIST,
    FinishReason,
    Ignored,
    RequestModel,
    ResponseModel,
    Unsupported,
    Usage,
)
from pjengine.serving.protocol.completions import PromptLogprobs
from pjengine.serving.protocol.sampling import SamplingRequest


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class ChatMessage(RequestModel):
    """One message of the conversation; `content` parts of type text are joined by line breaks."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Annotated[str, STRING] | Annotated[list[TextPart], LIST], STRING_OR_LIST] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = Field(None, description="Of an assistant's earlier answer.")
    tool_call_id: str | None = None
    # What clients send back of an earlier answer.
    refusal: Ignored = None
    annotations: Ignored = None
    audio: Unsupported = None
    function_call: Unsupported = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError(
                "content", "a message of role {role} needs it", {"role": self.role, "param": "content"}
            )
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: plain text content, and OpenAI's "developer" under its older name."""
        content = self.content
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": "\n".join(part.text for part in content) if isinstance(content, list) else content or "",
        }
        optional = {"name": self.name, "tool_calls": self.tool_calls, "tool_call_id": self.tool_call_id}
        return message | {name: value for name, value in optional.items() if value is not None}


def _variables(value: dict[str, Any]) -> dict[str, Any]:
    if taken := {"self", "messages", "tools", "add_generation_prompt"} & value.keys():
        raise PydanticCustomError("template_variable", "{name} is set by the server", {"name": min(taken)})
    return value


TemplateVariables = Annotated[
    dict[str, Any], AfterValidator(_variables), Field(description="For the model's template.")
]


class ResponseFormat(RequestModel):
    type: Literal["text"]


class ChatCompletionRequest(SamplingRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="null: up to the model's window.")
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens.")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    add_special_tokens: bool = Field(False, description="Chat templates write the special tokens themselves.")
    chat_template_kwargs: TemplateVariables | None = None
    response_format: ResponseFormat | None = None

    parallel_tool_calls: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="Refused unless empty.")
    tool_choice: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: Any) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise PydanticCustomError("top_logprobs", "is allowed only with logprobs: true")
        return value


class TopLogprob(ResponseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    content: list[TokenLogprob] | None
    refusal: None = None


class AssistantMessage(ResponseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(ResponseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None


class ChatCompletionResponse(ResponseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class Delta(ResponseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(ResponseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class ChatCompletionChunk(ResponseModel):
    """One event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
