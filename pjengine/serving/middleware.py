"""What every request passes before a route sees it: the key, and whether the server still takes work."""

from __future__ import annotations

import asyncio
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pjengine.serving.errors import ApiError, unavailable

OPEN_PATHS = frozenset({"/health", "/metrics"})  # for load balancers and Prometheus: no key, and served to the end


class Gate:
    """Counts the requests inside; once shut it turns new ones away with 503.

    Attributes:
      shut: no new requests.
    """

    def __init__(self) -> None:
        self.shut = False
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def enter(self) -> None:
        """Raises ApiError if shut."""
        if self.shut:
            raise unavailable("the server is shutting down", "shutting_down", retry_after=10)
        self._inside += 1
        self._empty.clear()

    def leave(self) -> None:
        self._inside -= 1
        if self._inside == 0:
            self._empty.set()

    async def wait_empty(self) -> None:
        await self._empty.wait()


class GateMiddleware:
    """Holds each request's place in the gate until the last byte of its answer."""

    def __init__(self, app: ASGIApp, gate: Gate):
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self.app(scope, receive, send)
        try:
            self.gate.enter()
        except ApiError as error:
            return await error.response()(scope, receive, send)
        try:
            await self.app(scope, receive, send)
        finally:
            self.gate.leave()


class KeyMiddleware:
    """401 unless the request brings `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, api_key: str):
        self.app = app
        self._expected = b"Bearer " + api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(
                    401,
                    "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                return await error.response()(scope, receive, send)
        await self.app(scope, receive, send)
