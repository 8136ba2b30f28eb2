"""One server from start to end: the engine's process, the HTTP server, signals, draining, exit code."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn

import pjengine
from pjengine.config import EngineConfig
from pjengine.errors import ConfigError
from pjengine.models.sources import Source, resolve
from pjengine.serving.app import make_app
from pjengine.serving.context import ServerContext
from pjengine.serving.engine_client import EngineClient
from pjengine.serving.engine_process import MakeEngine, make_default_engine
from pjengine.serving.logs import configure_logging
from pjengine.serving.metrics import ServerMetrics
from pjengine.serving.middleware import Gate
from pjengine.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

LOG_LEVELS = ("critical", "error", "warning", "info", "debug")
FAREWELL_SECONDS = 1.0  # a server whose engine died answers so long with errors before it ends
FLUSH_SECONDS = 2.0  # for clients to read the last bytes of their answers
KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, so that it is they who close them


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of the HTTP server.

    Attributes:
      host, port: where to listen; port 0 takes a free one.
      served_model_names: what requests may call the model; empty: the model as given.
      api_key: asked of every request but /health and /metrics; None: none is.
      max_body_bytes: longest body of a request.
      shutdown_grace: seconds that running requests have to finish after SIGTERM or Ctrl-C.
      log_level: one of LOG_LEVELS.
      access_log: log a line for each request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    api_key: str | None = None
    max_body_bytes: int = 32 << 20
    shutdown_grace: float = 30.0
    log_level: str = "info"
    access_log: bool = False

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, "port", self.port, "0 to 65535")
        _require(self.api_key is None or self.api_key.strip() != "", "api_key", self.api_key, "a key that is not empty")
        _require(self.max_body_bytes > 0, "max_body_bytes", self.max_body_bytes, "above 0")
        _require(self.shutdown_grace >= 0, "shutdown_grace", self.shutdown_grace, "at least 0")
        _require(self.log_level in LOG_LEVELS, "log_level", self.log_level, f"one of {', '.join(LOG_LEVELS)}")


@dataclasses.dataclass(frozen=True)
class TextSide:
    """What the API process needs of a model: its tokenizer and its own sampling defaults."""

    tokenizer: Tokenizer | None
    default_sampling: dict[str, Any]

    @classmethod
    def of(cls, source: Source) -> TextSide:
        return cls(load_tokenizer(source), source.default_sampling)


def load_text_side(config: EngineConfig) -> TextSide:
    """Of the model that the engine will load; fetches it if need be, so that the engine finds it."""
    return TextSide.of(resolve(config.model, config.load_format))


def run_server(
    options: ServerOptions,
    config: EngineConfig,
    *,
    make_engine: MakeEngine = make_default_engine,
    load_text: Callable[[EngineConfig], TextSide] = load_text_side,
) -> int:
    """Serves until a signal or the engine's end; returns the exit code.

    0 after draining, 1 if the engine died, 128 + n where a second signal n cut the draining short.

    Args:
      make_engine, load_text: the model's two sides; `make_engine` is pickled and called in the engine's process.
    Raises:
      PJEngineError: it cannot start; the message is the cause.
    """
    configure_logging(options.log_level)
    logging.getLogger("uvicorn.access").setLevel(logging.INFO)  # written only with access_log
    with _bind(options.host, options.port) as listener:  # before the model is loaded: a port in use is known at once
        text = load_text(config)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_serve(options, config, make_engine, text, listener))


async def _serve(
    options: ServerOptions, config: EngineConfig, make_engine: MakeEngine, text: TextSide, listener: socket.socket
) -> int:
    async with _signals() as signals:
        client = EngineClient(make_engine, config, options.log_level)
        starting = asyncio.create_task(client.start())
        if await _first(starting, signals.first) is not starting:
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return 0
        await starting
        try:
            return await _serve_engine(options, config, client, text, listener, signals)
        finally:
            await client.stop()


async def _serve_engine(
    options: ServerOptions,
    config: EngineConfig,
    client: EngineClient,
    text: TextSide,
    listener: socket.socket,
    signals: Signals,
) -> int:
    names = options.served_model_names or (config.model,)
    gate = Gate()
    context = ServerContext(
        client=client,
        tokenizer=text.tokenizer,
        model_names=names,
        model_root=config.model,
        default_sampling=text.default_sampling,
        metrics=ServerMetrics(lambda: client.stats, names[0], pjengine.__version__),
        gate=gate,
        max_body_bytes=options.max_body_bytes,
    )
    server = _Server(
        uvicorn.Config(
            make_app(context, options.api_key),
            lifespan="off",
            log_config=None,
            access_log=options.access_log,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(FLUSH_SECONDS),
            server_header=False,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    listener.listen(server.config.backlog)  # so that what is printed next is true
    host, port = listener.getsockname()[:2]
    print(
        f"pjengine: serving {names[0]} on http://{f'[{host}]' if ':' in host else host}:{port}",
        file=sys.stderr,
        flush=True,
    )
    dead = asyncio.ensure_future(client.wait_dead())
    exit_code = 0
    try:
        first = await _first(dead, signals.first, serving)
        if first is dead:
            logger.error("%s", dead.result())
            await asyncio.sleep(FAREWELL_SECONDS)
            exit_code = 1
        elif first is not serving:
            exit_code = await _drain(gate, client, dead, signals, options.shutdown_grace)
        server.force_exit = exit_code > 128
        server.should_exit = True
        await serving
    finally:
        dead.cancel()
    return exit_code


async def _drain(gate: Gate, client: EngineClient, dead: asyncio.Future[str], signals: Signals, grace: float) -> int:
    """Turns new requests away and waits for the running ones; those that outlive the grace time get an error."""
    gate.shut = True
    logger.info("draining: %d requests have %g s to finish; a second signal stops at once", client.open_requests, grace)
    empty = asyncio.create_task(gate.wait_empty())
    first = await _first(empty, signals.second, dead, timeout=grace)
    if first is empty:
        return 0
    empty.cancel()
    client.fail("the server is shutting down")
    if first is signals.second:
        return 128 + signals.received[-1]
    return 0 if first is None else 1


class _Server(uvicorn.Server):
    """Signals are handled here, not by uvicorn, whose shutdown begins with closing the listener."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Signals:
    """SIGINT and SIGTERM as they come.

    Attributes:
      received: their numbers, in order.
      first, second: done when so many have come.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[None] = loop.create_future()
        self.second: asyncio.Future[None] = loop.create_future()

    def receive(self, number: int) -> None:
        self.received.append(number)
        for future in (self.first, self.second)[: len(self.received)]:
            if not future.done():
                future.set_result(None)


@contextlib.asynccontextmanager
async def _signals() -> AsyncIterator[Signals]:
    loop = asyncio.get_running_loop()
    signals = Signals()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, signals.receive, number)
    try:
        yield signals
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _first(*futures: asyncio.Future[Any], timeout: float | None = None) -> asyncio.Future[Any] | None:
    """The first of them that is done, in the order given; None when the time is up."""
    await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    return next((future for future in futures if future.done()), None)


@contextlib.contextmanager
def _bind(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket that does not listen yet: until the engine is ready, connections are refused."""
    with contextlib.ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise ConfigError(
                f"host, port: cannot listen on {host}:{port}: {error.strerror}; choose another --port"
            ) from error
        yield listener


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed; None: asyncio's own."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


def _require(ok: bool, field: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{field}: expected {allowed}, got {value!r}")
