"""A small HTTP/1.1 client on asyncio streams: one request per connection, the body handed out as it arrives.

A load generator must cost less than the server it measures, so this does only what a JSON API needs: chunked, counted
and close-delimited bodies, and server-sent events. No redirects, no compression, no cookies.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ssl
import urllib.parse
from collections.abc import AsyncGenerator

from pjengine.errors import ConfigError

_READ = 1 << 16  # bytes asked of the socket at once


class BadResponse(Exception):
    """The server's answer breaks HTTP or ends early; the message is short, so that equal failures count as one."""


@dataclasses.dataclass(frozen=True)
class Address:
    """Where an API lives.

    Attributes:
      tls: https.
      prefix: path before /v1, without a slash at its end.
      headers: of every request, as they are sent.
    """

    host: str
    port: int
    tls: bool
    prefix: str
    headers: bytes

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> Address:
        """From a base URL, with or without the /v1 that OpenAI clients want at its end.

        Raises: ConfigError naming what is wrong with the URL or the key.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"base_url: {url!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigError(f"base_url: expected a URL such as http://localhost:8000, got {url!r}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("api_key: expected printable ASCII characters")
        tls = parts.scheme == "https"
        headers = f"Host: {parts.netloc.rpartition('@')[2]}\r\nConnection: close\r\nAccept-Encoding: identity\r\n"
        if api_key:
            headers += f"Authorization: Bearer {api_key}\r\n"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(host, port or (443 if tls else 80), tls, prefix, headers.encode())


@dataclasses.dataclass(frozen=True)
class Response:
    """An answer whose head has been read. `body` yields its bytes as they arrive, unframed, never empty."""

    status: int
    body: AsyncGenerator[bytes]

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.body])


@contextlib.asynccontextmanager
async def request(address: Address, method: str, path: str, body: bytes = b"") -> AsyncGenerator[Response]:
    """Sends a request; the connection closes at the end of the block.

    Raises: OSError, BadResponse.
    """
    context = ssl.create_default_context() if address.tls else None
    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context, limit=_READ)
    try:
        head = f"{method} {address.prefix}{path} HTTP/1.1\r\n".encode() + address.headers
        if body:
            head += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
        writer.write(head + b"\r\n" + body)
        status, headers = await _read_head(reader)
        yield Response(status, _body(reader, headers))
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes]]:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        raise BadResponse("the server closed the connection before it answered") from error
    except asyncio.LimitOverrunError as error:
        raise BadResponse("no HTTP: the answer has no end of headers") from error
    first, *lines = head[:-4].split(b"\r\n")
    words = first.split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise BadResponse(f"no HTTP: the answer begins {first[:40]!r}")
    fields = (line.partition(b":") for line in lines)
    return int(words[1]), {name.lower(): value.strip() for name, _, value in fields}


async def _body(reader: asyncio.StreamReader, headers: dict[bytes, bytes]) -> AsyncGenerator[bytes]:
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        chunks = ChunkDecoder()
        while not chunks.done:
            data = await reader.read(_READ)
            if not data:
                raise BadResponse("the server closed the connection in the middle of an answer")
            if piece := chunks.feed(data):
                yield piece
        return
    left = int(headers[b"content-length"]) if headers.get(b"content-length", b"").isdigit() else None
    while left != 0:
        data = await reader.read(_READ)
        if not data:
            if left:
                raise BadResponse("the server closed the connection in the middle of an answer")
            return
        if left is not None:
            left -= len(data)
        yield data


class ChunkDecoder:
    """Undoes HTTP/1.1's chunked transfer coding (RFC 9112, 7.1), fed with whatever the socket gives."""

    def __init__(self) -> None:
        self.done = False
        self._buffer = b""

    def feed(self, data: bytes) -> bytes:
        """The content of all chunks that are now whole."""
        buffer = self._buffer + data if self._buffer else data
        at, pieces = 0, []
        while (end := buffer.find(b"\r\n", at)) >= 0:
            try:
                size = int(buffer[at:end].partition(b";")[0], 16)
            except ValueError as error:
                raise BadResponse("no HTTP: a chunk without its size") from error
            if size == 0:
                self.done = True  # trailers, if any, die with the connection
                break
            if len(buffer) < end + size + 4:
                break
            pieces.append(buffer[end + 2 : end + 2 + size])
            at = end + size + 4
        self._buffer = buffer[at:]
        return b"".join(pieces)


class EventDecoder:
    """Cuts a stream of server-sent events into the payloads of its `data:` lines."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
