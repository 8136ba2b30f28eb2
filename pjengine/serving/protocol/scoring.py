"""POST /v1/score, /v1/rerank, /v1/classify and their other paths, in vLLM's, Cohere's and Jina's shapes."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from pjengine.serving.protocol.base import (
    LIST,
    STRING,
    STRING_OR_LIST,
    RequestModel,
    ResponseModel,
    Unsupported,
    Usage,
)
from pjengine.serving.protocol.pooling import MAX_INPUTS, PoolingRequest, PromptInput

_Text = Annotated[str, STRING]
_TextList = Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), LIST]
Texts = Annotated[_Text | _TextList, STRING_OR_LIST]
UseActivation = Annotated[
    bool, Field(description="Apply the model's activation (sigmoid, softmax); false: logits as they are.")
]


class PairRequest(PoolingRequest):
    instruction: str | None = Field(None, description="What to judge by, for rerankers with a prompt (Qwen3-Reranker).")
    use_activation: UseActivation = True


class ScoreRequest(PairRequest):
    """Either text_1 and text_2 or queries and documents: one with one, one with many, or as many with as many."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None

    @model_validator(mode="after")
    def _two(self) -> Self:
        given = [name for name in ("text_1", "text_2", "queries", "documents") if getattr(self, name) is not None]
        if given not in (["text_1", "text_2"], ["queries", "documents"]):
            raise PydanticCustomError("texts", "give text_1 and text_2, or queries and documents")
        return self

    @property
    def fields(self) -> tuple[str, str]:
        """The two fields that hold the pairs."""
        return ("queries", "documents") if self.text_1 is None else ("text_1", "text_2")


class Score(ResponseModel):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreResponse(ResponseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: Usage


class DocumentText(RequestModel):
    text: str


def _document_form(value: Any) -> str | None:
    return "<string>" if isinstance(value, str) else "<object>" if isinstance(value, dict | DocumentText) else None


Document = Annotated[
    _Text | Annotated[DocumentText, Tag("<object>")],
    Discriminator(
        _document_form,
        custom_error_type="document",
        custom_error_message='should be a string or an object with a string "text"',
    ),
]


class RerankRequest(PairRequest):
    query: str
    documents: list[Document] = Field(min_length=1, max_length=MAX_INPUTS)
    top_n: int | None = Field(None, ge=0, description="Only the best so many; null or 0: all.")
    return_documents: bool = Field(True, description="Repeat the documents in the results.")
    rank_fields: Unsupported = None
    max_chunks_per_doc: Unsupported = None
    max_tokens_per_doc: Unsupported = None


class RankedText(ResponseModel):
    text: str


class RerankResult(ResponseModel):
    index: int
    document: RankedText | None = None
    relevance_score: float


class RerankResponse(ResponseModel):
    """Results from the most relevant to the least; `index` is the document's place in the request."""

    id: str
    model: str
    results: list[RerankResult]
    usage: Usage


class ClassifyRequest(PoolingRequest):
    input: PromptInput
    add_special_tokens: bool = Field(
        True, description="Wrap texts in the model's special tokens. Token ids are taken as they are."
    )
    use_activation: UseActivation = True


class Classification(ResponseModel):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyResponse(ResponseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: Usage
