"""POST /v1/embeddings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pjengine.serving.protocol.base import ResponseModel, Usage
from pjengine.serving.protocol.pooling import PoolingRequest, PromptInput


class EmbeddingRequest(PoolingRequest):
    input: PromptInput
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: of little-endian float32 values; null: float."
    )
    dimensions: int | None = Field(
        None, description="The first so many elements of each embedding, scaled to length 1 (Matryoshka models)."
    )
    input_type: Literal["query", "document"] = Field("query", description="Queries overtake documents in the engine.")
    prompt_name: str | None = Field(
        None, description='Which of the model\'s own prompts to put before each text; "": none; null: its default.'
    )
    add_special_tokens: bool = Field(
        True, description="Wrap texts in the model's special tokens. Token ids are taken as they are."
    )


class Embedding(ResponseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingResponse(ResponseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
