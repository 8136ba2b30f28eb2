"""An OpenAI-compatible server in a thread whose every delay is known. The first token of a prompt steers it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

FIRST, GAP = 0.05, 0.01  # seconds before the first event, and between events
REFUSE, FAIL, CUT, HANG, NO_USAGE, EARLY, GARBAGE, BAD_TEXT, CUT_STREAM = range(1, 10)


@dataclasses.dataclass
class ScriptedServer:
    """What the server saw. most: requests that were open at once. requests_per_connection: then it closes. models: the
    answer to /v1/models.
    """

    url: str = ""
    bodies: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    heads: list[bytes] = dataclasses.field(default_factory=list)
    open: int = 0
    most: int = 0
    connections: int = 0
    requests_per_connection: int = 1000
    models: bytes = b'{"data": [{"id": "m"}]}'

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            for _ in range(self.requests_per_connection):
                head = await reader.readuntil(b"\r\n\r\n")
                self.open += 1
                self.most = max(self.most, self.open)
                try:
                    await self._handle(head, reader, writer)
                finally:
                    self.open -= 1
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _handle(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heads.append(head)
        length = next((int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.startswith(b"Content-Length")), 0)
        body = json.loads(await reader.readexactly(length)) if length else {}
        await self._answer(head.split(b" ")[1].decode(), body, reader, writer)

    async def _answer(
        self, path: str, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if path == "/v1/models":
            return _whole(writer, 200, self.models)
        self.bodies.append(body)
        if path == "/v1/embeddings":
            await asyncio.sleep(FIRST)
            tokens = [len(text.split() if isinstance(text, str) else text) for text in body["input"]]
            data = [{"index": i, "embedding": [0.5]} for i in range(len(tokens))]
            return _whole(writer, 200, {"data": data, "usage": {"prompt_tokens": sum(tokens)}})
        if path not in ("/v1/completions", "/v1/chat/completions"):
            return _whole(writer, 404, {"error": {"message": "no such path"}})
        script = body["prompt"][0] if "prompt" in body else 0
        if script == REFUSE:
            return _whole(writer, 400, {"error": {"message": "prompt: refused"}})
        if script == GARBAGE:
            return writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        if script in (BAD_TEXT, CUT_STREAM):  # its end is that of the connection
            text = b"\xff" if script == BAD_TEXT else b"a"
            writer.write(b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": [{"text": "%b"}]}\n\n' % text)
            raise ConnectionError
        if script == HANG:
            await reader.read()  # until the client leaves
            return None
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        async for payload in _events(script, body):
            event = f"data: {payload}\n\n".encode()
            frame = b"%x\r\n%b\r\n" % (len(event), event)
            writer.write(frame[:7])  # a frame need not come in one piece
            await asyncio.sleep(0)
            writer.write(frame[7:])
            await writer.drain()
        if script == CUT:
            raise ConnectionError
        writer.write(b"0\r\n\r\n")


async def _events(script: int, body: dict[str, Any]) -> AsyncIterator[str]:
    chat, count = "messages" in body, body["max_tokens"]
    if chat:
        yield json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    await asyncio.sleep(FIRST)
    made = 1 if script in (EARLY, CUT, FAIL) else count
    for i in range(made):
        if i:
            await asyncio.sleep(GAP)
        yield json.dumps({"choices": [{"delta": {"content": "a"}} if chat else {"text": "a", "index": 0}]})
    if script == FAIL:
        yield json.dumps({"error": {"message": "the engine died", "code": 500}})
    if script in (FAIL, CUT):
        return
    if script != NO_USAGE:
        length = len(body["messages"][0]["content"].split()) if chat else len(body["prompt"])
        yield json.dumps({"choices": [], "usage": {"prompt_tokens": length, "completion_tokens": made}})
    yield "[DONE]"


def _whole(writer: asyncio.StreamWriter, status: int, body: dict[str, Any] | bytes) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(data), data))


@contextlib.contextmanager
def scripted() -> Iterator[ScriptedServer]:
    """Runs a server on a free port."""
    server, ready, stop = ScriptedServer(), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        listening = await asyncio.start_server(server.handle, "127.0.0.1", 0, backlog=1024)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        ready.set()
        await stop.wait()
        listening.close()
        handling = asyncio.all_tasks() - {asyncio.current_task()}
        for task in handling:
            task.cancel()
        await asyncio.gather(*handling, return_exceptions=True)
        await asyncio.sleep(0)  # transports close on the loop's next round

    thread = threading.Thread(target=lambda: (loop.run_until_complete(run()), loop.close()))
    thread.start()
    ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
