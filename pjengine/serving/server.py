"""One server from start to end: the engine's process, the API processes, signals, draining, exit code."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pjengine.config import EngineConfig
from pjengine.errors import ConfigError
from pjengine.queue.options import QueueOptions
from pjengine.serving.api_processes import STOP_SECONDS, ApiProcess, ApiProcesses
from pjengine.serving.context import make_context
from pjengine.serving.engine_client import Client, EngineClient
from pjengine.serving.engine_host import EngineHost
from pjengine.serving.engine_process import FIRST_CLIENT, MakeEngine, make_default_engine
from pjengine.serving.http_server import Signals, engine_ready, loop_factory, serve_http
from pjengine.serving.logs import configure_logging
from pjengine.serving.queue_client import QueueClient
from pjengine.serving.server_options import ServerOptions
from pjengine.serving.text_side import LoadText, TextSide, load_text_side


def run_server(
    options: ServerOptions,
    config: EngineConfig,
    *,
    queue: QueueOptions | None = None,
    make_engine: MakeEngine = make_default_engine,
    load_text: LoadText = load_text_side,
) -> int:
    """Serves until a signal or the engine's end; returns the exit code.

    0 after draining, 1 if the engine died, 128 + n where a second signal n cut the draining short.

    Args:
      queue: where workers take the requests from; None: the engine runs here, in a process of its own.
      make_engine, load_text: the model's two sides; `make_engine` is pickled and called in the engine's process,
        `load_text` called in each API process.
    Raises:
      PJEngineError: it cannot start; the message is the cause.
    """
    configure_logging(options.log_level)
    logging.getLogger("uvicorn.access").setLevel(logging.INFO)  # written only with access_log
    # Before the model is loaded: a port in use is known at once.
    with bind(options.host, options.port, options.api_processes) as listeners:
        text = load_text(config)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_serve(options, config, queue, make_engine, load_text, text, listeners))


async def _serve(
    options: ServerOptions,
    config: EngineConfig,
    queue: QueueOptions | None,
    make_engine: MakeEngine,
    load_text: LoadText,
    text: TextSide,
    listeners: Sequence[socket.socket],
) -> int:
    async with contextlib.AsyncExitStack() as stack:  # undone in reverse, whatever happens
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pjengine-")))  # mode 0700
        address, counters = f"ipc://{directory / 'engine'}", directory / "counters"
        connect: Callable[[str], Client]
        connect = functools.partial(QueueClient, queue, config) if queue else functools.partial(EngineClient, address)
        client = connect(FIRST_CLIENT)
        stack.push_async_callback(client.close)
        others = ApiProcesses(ApiProcess(0, options, config, load_text, connect, counters), client)
        signals = Signals()
        stack.enter_context(signals.handled(also=others.tell))

        def engine_ended(how: str) -> None:
            client.fail(how)
            others.tell(how)

        if isinstance(client, EngineClient):
            host = EngineHost(make_engine, config, address, options.log_level, engine_ended)
            stack.push_async_callback(lambda: host.stop(asked=client.stop_engine()))
        stack.push_async_callback(lambda: others.stop(options.shutdown_grace + STOP_SECONDS))
        others.start(listeners[1:])
        if not await engine_ready(client, signals) or not await others.all_serve(signals):
            return 0
        context = make_context(client, text, config, options, counters, 0)

        def announce() -> None:
            host, port = listeners[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"pjengine: serving {context.model_names[0]} on http://{host}:{port}", file=sys.stderr, flush=True)

        return await serve_http(context, options, listeners[0], signals, announce)


@contextlib.contextmanager
def bind(host: str, port: int, count: int) -> Iterator[list[socket.socket]]:
    """`count` sockets bound to one port, among which the kernel deals out connections. They do not listen yet: until
    the engine is ready, connections are refused.
    """
    with contextlib.ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]

            def bound(shared: bool) -> socket.socket:
                listener = stack.enter_context(socket.socket(family, kind, protocol))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if shared:
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listener.bind(address)
                return listener

            first = bound(shared=False)
            listeners = [first]
            if count > 1:
                # A shared port could be shared with another server of this user; the first socket told that it is free.
                address = first.getsockname()
                first.close()
                listeners = [bound(shared=True) for _ in range(count)]
        except OSError as error:
            raise ConfigError(
                f"host, port: cannot listen on {host}:{port}: {error.strerror}; choose another --port"
            ) from error
        yield listeners
