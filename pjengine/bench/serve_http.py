"""A small HTTP/1.1 client on asyncio streams: connections are used again, the body is handed out as it arrives.

A load generator must cost less than the server it measures, so this does only what a JSON API needs: chunked, counted
and close-delimited bodies, and server-sent events. No redirects, no compression, no cookies.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ssl
import time
import urllib.parse
from collections.abc import AsyncGenerator
from typing import Self

from pjengine.errors import ConfigError

_READ = 1 << 16  # bytes asked of the socket at once
_IDLE_SECONDS = 2.0  # a connection idle for longer is not used again: many servers close theirs after 5


class BadResponse(Exception):
    """The server's answer breaks HTTP or ends early; the message is short, so that equal failures count as one."""


class Unanswered(BadResponse):
    """The server closed the connection before the first byte of an answer."""


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
        headers = f"Host: {parts.netloc.rpartition('@')[2]}\r\nAccept-Encoding: identity\r\n"
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


@dataclasses.dataclass
class _Connection:
    """idle_since: `time.monotonic()` of its last answer's end; None: nothing was answered on it yet."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    idle_since: float | None = None


class Connections:
    """The connections to one server. An idle one is used again, the last one first, for a new one costs both sides."""

    def __init__(self, address: Address):
        self._address = address
        self._tls = ssl.create_default_context() if address.tls else None
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.writer.close()

    @contextlib.asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncGenerator[Response]:
        """Sends a request. Raises: OSError, BadResponse."""
        head = f"{method} {self._address.prefix}{path} HTTP/1.1\r\n".encode() + self._address.headers
        if body:
            head += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
        connection, status, headers = await self._send(head + b"\r\n" + body)
        framing = _Framing(headers)
        try:
            yield Response(status, framing.body(connection.reader))
        finally:
            if framing.done and headers.get(b"connection", b"").lower() != b"close":
                connection.idle_since = time.monotonic()
                self._idle.append(connection)
            else:
                connection.writer.close()

    async def _send(self, data: bytes) -> tuple[_Connection, int, dict[bytes, bytes]]:
        """Until the head of the answer; once more where the server had closed an idle connection."""
        while True:
            connection = await self._connection()
            try:
                connection.writer.write(data)
                return connection, *await _read_head(connection.reader)
            except (ConnectionError, Unanswered):
                connection.writer.close()
                if connection.idle_since is None:
                    raise
            except BaseException:
                connection.writer.close()
                raise

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            idle = time.monotonic() - (connection.idle_since or 0)
            if idle < _IDLE_SECONDS and not connection.reader.at_eof():
                return connection
            connection.writer.close()
        address = self._address
        return _Connection(*await asyncio.open_connection(address.host, address.port, ssl=self._tls, limit=_READ))


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes]]:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        kind = BadResponse if error.partial else Unanswered
        raise kind("the server closed the connection before it answered") from error
    except asyncio.LimitOverrunError as error:
        raise BadResponse("no HTTP: the answer has no end of headers") from error
    first, *lines = head[:-4].split(b"\r\n")
    words = first.split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise BadResponse(f"no HTTP: the answer begins {first[:40]!r}")
    fields = (line.partition(b":") for line in lines)
    return int(words[1]), {name.lower(): value.strip() for name, _, value in fields}


class _Framing:
    """How an answer's body is cut from the connection's bytes. done: it has ended where the next answer may begin."""

    def __init__(self, headers: dict[bytes, bytes]):
        self.done = False
        self._chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        length = headers.get(b"content-length", b"")
        self._length = int(length) if length.isdigit() else None

    async def body(self, reader: asyncio.StreamReader) -> AsyncGenerator[bytes]:
        if self._chunked:
            chunks = ChunkDecoder()
            while not chunks.done:
                data = await reader.read(_READ)
                if not data:
                    raise BadResponse("the server closed the connection in the middle of an answer")
                if piece := chunks.feed(data):
                    yield piece
            self.done = chunks.clean
        else:
            left = self._length
            while left != 0:
                data = await reader.read(_READ if left is None else min(_READ, left))
                if not data:
                    if left:
                        raise BadResponse("the server closed the connection in the middle of an answer")
                    return
                if left is not None:
                    left -= len(data)
                yield data
            self.done = True


class ChunkDecoder:
    """Undoes HTTP/1.1's chunked transfer coding (RFC 9112, 7.1), fed with whatever the socket gives.

    Attributes:
      done: all has been read; clean: and nothing beyond it.
    """

    def __init__(self) -> None:
        self.done = self.clean = False
        self._buffer = b""

    def feed(self, data: bytes) -> bytes:
        """The content of all chunks that are now whole."""
        buffer = self._buffer + data if self._buffer else data
        at, pieces = 0, []
        while (end := buffer.find(b"\r\n", at)) >= 0:
            try:
                size = int(buffer[at:end].partition(b";")[0], 16)
            except ValueError:
                size = -1
            if size < 0:
                raise BadResponse("no HTTP: a chunk without its size")
            if size == 0:
                if len(buffer) >= end + 4:
                    self.done = True
                    self.clean = buffer[end:] == b"\r\n\r\n"  # trailers die with the connection
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
