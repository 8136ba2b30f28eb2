"""Sends a workload to an OpenAI-compatible server and records what comes back. Runs in processes of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import resource
import signal
import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from pjengine.bench.serve_http import Address, BadResponse, Connections, EventDecoder, Response
from pjengine.bench.serve_trace import Trace
from pjengine.bench.workloads import Item
from pjengine.errors import ConfigError

Endpoint = Literal["completions", "chat", "embeddings"]
PATHS: dict[Endpoint, str] = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "embeddings": "/v1/embeddings",
}
_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
_SHOWN = 160  # characters of a server's error message


@dataclasses.dataclass(frozen=True)
class Call:
    """A request ready to be sent.

    Attributes:
      due: seconds after the start of the run.
      asked: output tokens.
      texts: prompts in it.
    """

    due: float
    body: bytes
    asked: int
    texts: int = 1


@dataclasses.dataclass(frozen=True)
class Form:
    """How the workload's items become requests; all but the endpoint is for embeddings.

    Attributes:
      texts: items that share a request.
      text: send words, about one token each, which the server tokenizes; else token ids.
      encoding_format: "float" or "base64".
    """

    endpoint: Endpoint
    texts: int = 1
    text: bool = False
    encoding_format: str = "float"

    def __post_init__(self) -> None:
        if self.endpoint not in PATHS:
            raise ConfigError(f"endpoint: expected one of {', '.join(PATHS)}, got {self.endpoint!r}")
        if self.encoding_format not in ("float", "base64"):
            raise ConfigError(f"encoding_format: expected float or base64, got {self.encoding_format!r}")
        if self.endpoint != "embeddings" and (self.texts, self.text, self.encoding_format) != (1, False, "float"):
            raise ConfigError(
                f"endpoint: {self.endpoint} takes one prompt a request; texts_per_request, send_text and "
                "encoding_format are for embeddings"
            )

    def calls(self, model: str, work: Sequence[Item], due: Sequence[float]) -> list[Call]:
        """The requests of a workload, in order.

        Args:
          due: of each of them, one per `texts` items.
        """
        starts = range(0, len(work), self.texts)
        groups = [work[at : at + self.texts] for at in starts]
        generates = self.endpoint != "embeddings"
        return [
            Call(at, self.body(model, items), items[0].output_len if generates else 0, len(items))
            for at, items in zip(due, groups, strict=True)
        ]

    def body(self, model: str, items: Sequence[Item]) -> bytes:
        """The JSON of a request. Text is generated greedily, streamed, and not ended by the model (`ignore_eos`, vLLM's
        extension). Chat has no token ids: its prompt is words.
        """
        if self.endpoint == "embeddings":
            inputs = [_words(item) if self.text else item.prompt_token_ids for item in items]
            return msgspec.json.encode({"model": model, "input": inputs, "encoding_format": self.encoding_format})
        (item,) = items
        fields = {
            "model": model,
            "max_tokens": item.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,  # or tokens would come that cannot be seen to come
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint == "chat":
            return msgspec.json.encode(fields | {"messages": [{"role": "user", "content": _words(item)}]})
        return msgspec.json.encode(fields | {"prompt": item.prompt_token_ids})


@dataclasses.dataclass(frozen=True)
class Load:
    """The share of a workload that one process sends, in order of `due`.

    Attributes:
      concurrency: most requests in flight.
      timeout: seconds after which a request has failed.
    """

    address: Address
    endpoint: Endpoint
    calls: Sequence[Call]
    concurrency: int
    timeout: float


async def drive(load: Load, start: float) -> list[Trace]:
    """Sends every call when it is due, whatever has come back by then, unless `concurrency` are in flight.

    Args:
      start: when the run begins, `time.monotonic`.
    """
    places = asyncio.Semaphore(load.concurrency)
    traces = [Trace(due=start + call.due, asked=call.asked, texts=call.texts) for call in load.calls]
    async with Connections(load.address) as connections, asyncio.TaskGroup() as tasks:
        for call, trace in zip(load.calls, traces, strict=True):
            if (early := trace.due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            await places.acquire()
            sending = tasks.create_task(send(connections, load, call, trace))
            sending.add_done_callback(lambda _: places.release())
    return traces


async def send(connections: Connections, load: Load, call: Call, trace: Trace) -> None:
    """One request; fills its trace, also with what went wrong."""
    trace.sent = time.monotonic()
    try:
        async with (
            asyncio.timeout(load.timeout),
            connections.request("POST", PATHS[load.endpoint], call.body) as response,
        ):
            read = _read_embedding if load.endpoint == "embeddings" else _read_events
            trace.error = await (read(response, trace) if response.status == 200 else refusal(response))
    except TimeoutError:
        trace.error = f"no end within {load.timeout:g} s"
    except OSError as error:
        trace.error = f"connection failed: {error.strerror or error}"
    except BadResponse as error:
        trace.error = str(error)
    trace.finished = time.monotonic()


def run_client(connection: Any, load: Load) -> None:
    """The body of a client process: says that it is ready, learns the start, answers (traces, CPU seconds)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which takes its clients with it
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection is a file; many systems allow 1024 at first
    connection.send(None)
    start = connection.recv()
    before = time.process_time()
    traces = asyncio.run(drive(load, start))
    connection.send((traces, time.process_time() - before))


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0


class _Embedding(msgspec.Struct):
    """What it holds is not read: the client's time is the benchmark's."""


class _Event(msgspec.Struct):
    """The fields that are read of an event, of an embedding answer or of an error."""

    choices: list[_Choice] = []
    data: list[_Embedding] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


def _decode(data: bytes) -> _Event:
    """Raises: BadResponse if it is not JSON of that shape."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = _is_utf8(data)  # which releases of msgspec say differently
        raise BadResponse(str(error) if text else "the answer is not UTF-8") from error


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


async def _read_events(response: Response, trace: Trace) -> str | None:
    """Reads a stream to its end; what was wrong with it, or None."""
    decoder, usage, ended = EventDecoder(), None, False
    async for data in response.body:
        now = time.monotonic()
        for payload in decoder.feed(data):
            if payload == b"[DONE]":
                ended = True
                continue
            event = _decode(payload)
            if event.error is not None:
                return f"error in the stream: {_message(event.error)}"
            usage = event.usage or usage
            if event.choices and _has_text(event.choices[0]):
                trace.arrivals.append(now)
    if usage is None and not ended:
        return "the stream ended before its usage and [DONE]"
    if usage is None:
        return "the stream ended without its usage (stream_options.include_usage)"
    trace.prompt_tokens, trace.output_tokens = usage.prompt_tokens, usage.completion_tokens
    return None if trace.arrivals else "the stream brought no text"


async def _read_embedding(response: Response, trace: Trace) -> str | None:
    answer = _decode(await response.read())
    if answer.usage is None:
        return "the answer has no usage"
    if len(answer.data) != trace.texts:
        return f"{len(answer.data)} embeddings for {trace.texts} texts"
    trace.prompt_tokens = answer.usage.prompt_tokens
    return None


async def refusal(response: Response) -> str:
    """A status that is not 200, with what the server says of it."""
    body = await response.read()
    try:
        error: Any = _decode(body).error
    except BadResponse:
        error = None
    return f"HTTP {response.status}: {_message(error or body.decode(errors='replace'))}"


def _has_text(choice: _Choice) -> bool:
    delta = choice.delta
    return bool(choice.text or (delta is not None and (delta.content or delta.reasoning_content)))


def _words(item: Item) -> str:
    """As many common words as the prompt has tokens."""
    return " ".join([_WORDS[i % len(_WORDS)] for i in item.prompt_token_ids])


def _message(error: object) -> str:
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:_SHOWN]
