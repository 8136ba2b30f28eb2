"""Reading bodies under a limit, noticing clients that leave, and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pjengine.serving.errors import ApiError

T = TypeVar("T")

DISCARD_FACTOR = 4  # so many times the limit is read, and thrown away, for the client to hear our answer
DISCARD_SECONDS = 10.0


class Disconnected(Exception):
    """The client has gone; nobody waits for the answer."""


async def read_body(request: Request, limit: int) -> bytes:
    """The body, at most `limit` bytes of it ever held.

    Raises:
      ApiError: 413, it is longer.
    """
    body = bytearray()
    stream = request.stream()
    try:
        async for chunk in stream:
            body += chunk
            if len(body) > limit:
                body.clear()
                await _discard(stream, DISCARD_FACTOR * limit)
                raise ApiError(
                    413,
                    f"the body is longer than the limit of {limit} bytes; send less, or raise --max-body-bytes",
                    code="body_too_large",
                )
    except ClientDisconnect:
        raise Disconnected from None
    return bytes(body)


async def _discard(stream: AsyncGenerator[bytes], limit: int) -> None:
    """Most clients read an answer only when all is sent; had we closed with data unread they would see a reset."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            seen = 0
            async for chunk in stream:
                seen += len(chunk)
                if seen > limit:
                    break


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Awaits `work`; cancels it when the client leaves.

    Raises:
      Disconnected: it left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Disconnected
        return working.result()
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. However it ends, by a client that leaves or at the last event, `close` is called.

    Args:
      events: each event's data, one line.
      close: frees what the events are made from.
      on_error: an exception of `events` as the data of a last event: the status line is long gone by then.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes], close: Callable[[], None], on_error: Callable[[Exception], bytes]
    ):
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except Disconnected:
            pass
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        async def write(data: bytes) -> None:
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

        headers: list[Any] = self.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with contextlib.aclosing(self._events):
            try:
                async for data in self._events:
                    await write(data)
            except Exception as error:
                await write(self._on_error(error))
        await write(b"[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
