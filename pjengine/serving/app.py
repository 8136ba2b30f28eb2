"""The ASGI application: a table of endpoints, and what turns it into routes."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pjengine.errors import DeadlineExceeded, EngineDead, EngineOverloaded, InvalidRequest
from pjengine.serving.context import ServerContext
from pjengine.serving.errors import ApiError, GenerationError, handle_error
from pjengine.serving.http_io import Disconnected, read_body, until_disconnect
from pjengine.serving.middleware import GateMiddleware, KeyMiddleware
from pjengine.serving.openapi import openapi_document
from pjengine.serving.protocol.base import RequestModel
from pjengine.serving.protocol.chat import ChatCompletionChunk, ChatCompletionRequest, ChatCompletionResponse
from pjengine.serving.protocol.completions import CompletionRequest, CompletionResponse
from pjengine.serving.protocol.embeddings import EmbeddingRequest, EmbeddingResponse
from pjengine.serving.protocol.models import ModelCard, ModelList, VersionResponse
from pjengine.serving.protocol.scoring import (
    ClassifyRequest,
    ClassifyResponse,
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
)
from pjengine.serving.protocol.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from pjengine.serving.routes import server
from pjengine.serving.routes.chat import create_chat_completion
from pjengine.serving.routes.classify import create_classification
from pjengine.serving.routes.completions import create_completion
from pjengine.serving.routes.embeddings import create_embeddings
from pjengine.serving.routes.scoring import create_rerank, create_score
from pjengine.serving.routes.tokens import detokenize, tokenize

CLIENT_CLOSED_REQUEST = 499  # nginx's status for an answer that nobody reads


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A row of the table: from it come the route and its part of the OpenAPI document.

    Attributes:
      handler: `handler(context, body)` with a `request` model, else `handler(context, **path_parameters)`.
      response: None: not JSON; event: of a streamed answer.
    """

    method: str
    path: str
    summary: str
    handler: Callable[..., Awaitable[Response]]
    request: type[RequestModel] | None = None
    response: type[BaseModel] | None = None
    event: type[BaseModel] | None = None


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        "Answer a conversation",
        create_chat_completion,
        ChatCompletionRequest,
        ChatCompletionResponse,
        ChatCompletionChunk,
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        "Continue a text",
        create_completion,
        CompletionRequest,
        CompletionResponse,
        CompletionResponse,
    ),
    Endpoint("POST", "/v1/embeddings", "Embed texts", create_embeddings, EmbeddingRequest, EmbeddingResponse),
    *(
        Endpoint("POST", path, "Rank documents by relevance to a query", create_rerank, RerankRequest, RerankResponse)
        for path in ("/v1/rerank", "/rerank", "/v2/rerank")
    ),
    *(
        Endpoint("POST", path, "Score pairs of texts", create_score, ScoreRequest, ScoreResponse)
        for path in ("/v1/score", "/score")
    ),
    *(
        Endpoint("POST", path, "Sort texts into classes", create_classification, ClassifyRequest, ClassifyResponse)
        for path in ("/v1/classify", "/classify")
    ),
    Endpoint("GET", "/v1/models", "What is served", server.list_models, response=ModelList),
    Endpoint("GET", "/v1/models/{model:path}", "One served model", server.retrieve_model, response=ModelCard),
    Endpoint("POST", "/tokenize", "Token ids of a text or conversation", tokenize, TokenizeRequest, TokenizeResponse),
    Endpoint("POST", "/detokenize", "Text of token ids", detokenize, DetokenizeRequest, DetokenizeResponse),
    Endpoint("GET", "/health", "200 while requests are served", server.health),
    Endpoint("GET", "/version", "pjengine's version", server.version, response=VersionResponse),
    Endpoint("GET", "/metrics", "Prometheus' text format", server.metrics),
)


def make_app(context: ServerContext, api_key: str | None) -> Starlette:
    """The application that serves one model; `api_key` None: no key is asked for."""
    document = openapi_document(ENDPOINTS)

    async def openapi(request: Request) -> Response:
        return JSONResponse(document)

    middleware = [Middleware(GateMiddleware, gate=context.gate)]
    if api_key is not None:
        middleware.insert(0, Middleware(KeyMiddleware, api_key=api_key))
    errors: tuple[type[Exception], ...] = (
        ApiError,
        ValidationError,
        InvalidRequest,
        EngineOverloaded,
        EngineDead,
        DeadlineExceeded,
        GenerationError,
        HTTPException,
        Exception,
    )
    return Starlette(
        routes=[*(_route(context, endpoint) for endpoint in ENDPOINTS), Route("/openapi.json", openapi)],
        middleware=middleware,
        exception_handlers=dict.fromkeys(errors, handle_error),
    )


def _route(context: ServerContext, endpoint: Endpoint) -> Route:
    async def answer(request: Request) -> Response:
        try:
            if endpoint.request is None:
                return await endpoint.handler(context, **request.path_params)
            body = endpoint.request.model_validate_json(await read_body(request, context.max_body_bytes))
            return await until_disconnect(request.receive, endpoint.handler(context, body))
        except Disconnected:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    return Route(endpoint.path, answer, methods=[endpoint.method], name=endpoint.handler.__name__)
