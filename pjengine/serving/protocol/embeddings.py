"""POST /v1/embeddings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pjengine.serving.protocol.base import Ignored, RequestModel, ResponseModel, Unsupported, Usage
from pjengine.serving.protocol.completions import Prompt


class EmbeddingRequest(RequestModel):
    model: str | None = Field(None, description="A name that /v1/models lists; null: the model that is served.")
    input: Prompt
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: of little-endian float32 values.")
    add_special_tokens: bool = Field(
        True, description="Wrap texts in the model's special tokens. Token ids are taken as they are."
    )
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="Lower runs first.")
    user: Ignored = None
    dimensions: Unsupported = None


class Embedding(ResponseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingResponse(ResponseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
