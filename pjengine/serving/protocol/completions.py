"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from pjengine.sampling_params import MAX_LOGPROBS
from pjengine.serving.protocol.base import FinishReason, ResponseModel, Unsupported, Usage
from pjengine.serving.protocol.sampling import SamplingRequest

# Fail fast: of a hundred thousand wrong token ids one is reported.
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]


def _prompt_form(prompt: Any) -> str | None:
    """The first element tells which of a list's forms is meant, so that an error can name the element at fault."""
    if isinstance(prompt, list):
        return {int: "<ids>", list: "<lists>"}.get(type(prompt[0]) if prompt else str, "<texts>")
    return "<text>" if isinstance(prompt, str) else None


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[Texts, Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(fail_fast=True), Tag("<lists>")],
    Discriminator(
        _prompt_form,
        custom_error_type="prompt",
        custom_error_message="should be a string, token ids, or a list of either",
    ),
]


class CompletionRequest(SamplingRequest):
    prompt: Prompt
    max_tokens: int | None = Field(16, ge=0, description="0 only with echo: the prompt alone is scored.")
    echo: bool = Field(False, description="The text starts with the prompt, logprobs with the prompt's.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="This many most likely tokens at each position."
    )
    add_special_tokens: bool = Field(True, description="Begin text prompts with the model's special tokens.")
    best_of: int | None = Field(None, description="Refused unless equal to n.")
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.best_of not in (None, self.n):
            raise PydanticCustomError("best_of", "is not supported by this server; leave it out", {"param": "best_of"})
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "should be at least 1 without echo", {"param": "max_tokens"})
        return self


class CompletionLogprobs(ResponseModel):
    """One entry per token; of an echoed prompt's first token the log-probability is null."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(ResponseModel):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]  # by token id; null for the prompt's first token


class CompletionChoice(ResponseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionResponse(ResponseModel):
    """The answer, or one event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
