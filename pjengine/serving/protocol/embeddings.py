"""POST /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from pjengine.serving.protocol.base import ResponseModel, Usage
from pjengine.serving.protocol.completions import Prompt
from pjengine.serving.protocol.pooling import MAX_INPUTS, PoolingRequest


def _at_most(value: Any) -> Any:
    if isinstance(value, list) and value and not isinstance(value[0], int) and len(value) > MAX_INPUTS:
        raise PydanticCustomError(
            "too_many", "has {found} inputs; send at most {most} a request", {"found": len(value), "most": MAX_INPUTS}
        )
    return value


class EmbeddingRequest(PoolingRequest):
    input: Annotated[Prompt, AfterValidator(_at_most)]
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: of little-endian float32 values.")
    dimensions: int | None = Field(
        None, description="The first so many elements of each embedding, scaled to length 1 (Matryoshka models)."
    )
    input_type: Literal["query", "document"] = Field("query", description="Queries overtake documents in the engine.")
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
