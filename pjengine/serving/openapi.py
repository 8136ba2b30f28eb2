"""The OpenAPI document of a table of endpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Protocol

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import pjengine
from pjengine.serving.protocol.base import ErrorResponse

_REF = "#/components/schemas/{model}"


class EndpointLike(Protocol):
    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def request(self) -> type[BaseModel] | None: ...
    @property
    def response(self) -> type[BaseModel] | None: ...
    @property
    def event(self) -> type[BaseModel] | None: ...


def openapi_document(endpoints: Iterable[EndpointLike]) -> dict[str, Any]:
    """OpenAPI 3.1, as plain data."""
    endpoints = tuple(endpoints)
    requests = [e.request for e in endpoints if e.request]
    responses = [m for e in endpoints for m in (e.response, e.event) if m]
    modes: list[Any] = [(m, "validation") for m in requests] + [
        (m, "serialization") for m in [*responses, ErrorResponse]
    ]
    refs, definitions = models_json_schema(modes, ref_template=_REF)
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        names = re.findall(r"\{(\w+):path\}", endpoint.path)
        operation: dict[str, Any] = {
            "summary": endpoint.summary,
            "responses": {
                "200": {"description": "Success", "content": _content(endpoint, refs)},
                "default": {
                    "description": "Error",
                    "content": {"application/json": {"schema": refs[ErrorResponse, "serialization"]}},
                },
            },
        }
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        if endpoint.request is not None:
            schema = refs[endpoint.request, "validation"]
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths.setdefault(endpoint.path.replace(":path}", "}"), {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "pjengine", "version": pjengine.__version__},
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _content(endpoint: EndpointLike, refs: dict[Any, Any]) -> dict[str, Any]:
    content = {}
    if endpoint.response is not None:
        content["application/json"] = {"schema": refs[endpoint.response, "serialization"]}
    if endpoint.event is not None:
        content["text/event-stream"] = {"schema": refs[endpoint.event, "serialization"]}
    return content
