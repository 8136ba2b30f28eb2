"""HTTP in one process, from the first connection to the last byte of the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from pjengine.errors import ShuttingDown
from pjengine.serving.app import make_app
from pjengine.serving.context import ServerContext
from pjengine.serving.engine_client import Client
from pjengine.serving.middleware import Gate
from pjengine.serving.server_options import ServerOptions

logger = logging.getLogger(__name__)

FAREWELL_SECONDS = 1.0  # a server whose engine died answers so long with errors before it ends
FLUSH_SECONDS = 2.0  # for clients to read the last bytes of their answers
KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, so that it is they who close them


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

    @contextlib.contextmanager
    def handled(self, also: Callable[[int], None]) -> Iterator[None]:
        """Within it this process's signals are received; each is given to `also` as well."""
        loop = asyncio.get_running_loop()

        def handle(number: int) -> None:
            also(number)
            self.receive(number)

        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, handle, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


async def engine_ready(client: Client, signals: Signals) -> bool:
    """Waits until the engine can serve; False: a signal came first. Raises PJEngineError if it cannot."""
    starting = asyncio.create_task(client.wait_ready())
    if await first_done(starting, signals.first) is starting:
        await starting
        return True
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    return False


async def serve_http(
    context: ServerContext,
    options: ServerOptions,
    listener: socket.socket,
    signals: Signals,
    on_listening: Callable[[], None],
) -> int:
    """Serves until a signal or the engine's end; returns the exit code: 0, 1, or 128 + a second signal's number.

    Args:
      listener: bound; it listens when `on_listening` is called.
    """
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
    listener.listen(server.config.backlog)
    on_listening()
    dead = asyncio.ensure_future(context.client.wait_dead())
    exit_code = 0
    try:
        first = await first_done(dead, signals.first, serving)
        if first is dead:
            logger.error("%s", dead.result())
            await asyncio.sleep(FAREWELL_SECONDS)
            exit_code = 1
        elif first is not serving:
            exit_code = await _drain(context.gate, context.client, dead, signals, options.shutdown_grace)
        server.force_exit = exit_code > 128
        server.should_exit = True
        await serving
    finally:
        dead.cancel()
    return exit_code


async def _drain(gate: Gate, client: Client, dead: asyncio.Future[str], signals: Signals, grace: float) -> int:
    """Turns new requests away and waits for the running ones; those that outlive the grace time get an error."""
    gate.shut = True
    logger.info("draining: %d requests have %g s to finish; a second signal stops at once", client.open_requests, grace)
    empty = asyncio.create_task(gate.wait_empty())
    first = await first_done(empty, signals.second, dead, timeout=grace)
    if first is empty:
        return 0
    empty.cancel()
    client.fail("the server is shutting down", ShuttingDown)
    if first is signals.second:
        return 128 + signals.received[-1]
    return 0 if first is None else 1


class _Server(uvicorn.Server):
    """Signals are handled by us, not by uvicorn, whose shutdown begins with closing the listener."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def first_done(*futures: asyncio.Future[Any], timeout: float | None = None) -> asyncio.Future[Any] | None:
    """The first of them that is done, in the order given; None when the time is up."""
    await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    return next((future for future in futures if future.done()), None)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed; None: asyncio's own."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop
