"""GET /v1/models, /health and /version."""

from __future__ import annotations

from typing import Literal

from pjengine.serving.protocol.base import ResponseModel


class ModelCard(ResponseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["pjengine"] = "pjengine"
    root: str
    max_model_len: int


class ModelList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class VersionResponse(ResponseModel):
    version: str
