"""GET /v1/models, /health, /version and /metrics."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

import pjengine
from pjengine.serving.context import ServerContext
from pjengine.serving.errors import unavailable
from pjengine.serving.protocol.models import ModelCard, ModelList, VersionResponse
from pjengine.serving.responses import json_response


async def list_models(context: ServerContext) -> Response:
    return json_response(ModelList(data=[_card(context, name) for name in context.model_names]))


async def retrieve_model(context: ServerContext, model: str) -> Response:
    context.require_model(model)
    return json_response(_card(context, model))


async def health(context: ServerContext) -> Response:
    """200 with an empty body while new requests are served."""
    context.client.require_alive()
    if context.gate.shut:
        raise unavailable("the server is shutting down", "shutting_down")
    return Response()


async def version(context: ServerContext) -> Response:
    return json_response(VersionResponse(version=pjengine.__version__))


async def metrics(context: ServerContext) -> Response:
    return Response(context.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _card(context: ServerContext, name: str) -> ModelCard:
    return ModelCard(
        id=name, created=context.created, root=context.model_root, max_model_len=context.info.max_model_len
    )
