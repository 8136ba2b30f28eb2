"""The sampling fields that completions and chat share: OpenAI's, then vLLM's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from pjengine.sampling_params import MAX_LOGPROBS, MAX_N
from pjengine.serving.protocol.base import LIST, STRING, STRING_OR_LIST, Ignored, RequestModel

# Fields of the same name and meaning in SamplingParams; null leaves the model's default. Ranges are checked there.
_PARAMS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


class StreamOptions(RequestModel):
    include_usage: bool = Field(False, description="A last event, with no choices, carries the usage.")
    include_obfuscation: Ignored = None


class SamplingRequest(RequestModel):
    """How to sample; meanings and ranges are those of `pjengine.SamplingParams`."""

    model: str | None = Field(None, description="A name that /v1/models lists; null: the model that is served.")
    n: int = Field(1, ge=1, le=MAX_N)
    stop: Annotated[Annotated[str, STRING] | Annotated[list[str], LIST], STRING_OR_LIST] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description="Token id -> value added to its logit.")
    stream: bool = False
    stream_options: StreamOptions | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="Lower runs first.")
    cache_salt: str | None = Field(
        None, min_length=1, description="Cached prefixes are shared only under an equal salt."
    )

    user: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdigit()):
                raise PydanticCustomError("token_id", "keys are token ids as strings, got {key}", {"key": repr(key)})
        return value

    @field_validator("stream_options")
    @classmethod
    def _only_streamed(cls, value: StreamOptions | None, info: Any) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise PydanticCustomError("stream_options", "is allowed only with stream: true")
        return value

    @field_validator("prompt_logprobs")
    @classmethod
    def _not_streamed(cls, value: int | None, info: Any) -> int | None:
        if value is not None and info.data.get("stream"):
            raise PydanticCustomError("prompt_logprobs", "is not available with stream: true")
        return value

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_fields(self) -> dict[str, Any]:
        """SamplingParams' fields as given, None where the model's default holds; not logprobs and max_tokens."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in _PARAMS}
        fields |= {"n": self.n, "stop": self.stop or None}
        if self.logit_bias is not None:
            fields["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return fields
