"""API processes beside the server's first: each speaks HTTP on the same port and has its own line to the engine.

The first process holds their listeners, so that connections wait while one that died is started anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import multiprocessing
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from pjengine.config import EngineConfig
from pjengine.errors import EngineDead, PJEngineError
from pjengine.serving.context import make_context
from pjengine.serving.engine_client import Client
from pjengine.serving.http_server import Signals, engine_ready, first_done, loop_factory, serve_http
from pjengine.serving.logs import configure_logging
from pjengine.serving.processes import become_child, how_it_ended, start_process
from pjengine.serving.server_options import ServerOptions
from pjengine.serving.text_side import LoadText, TextSide

logger = logging.getLogger(__name__)

MOST_DEATHS = 3  # within so many seconds; then something is wrong that a new start does not mend
DEATHS_SECONDS = 60.0
STOP_SECONDS = 5.0  # a process that has not ended so long after it should is killed


@dataclasses.dataclass(frozen=True)
class ApiProcess:
    """What an API process is started with.

    Attributes:
      row: of its counters, 1 and up; 0 is the first process's.
      connect: makes a client of the given name.
      counters: the file of all processes' counters.
    """

    row: int
    options: ServerOptions
    config: EngineConfig
    load_text: LoadText
    connect: Callable[[str], Client]
    counters: Path


class ApiProcesses:
    """The processes that the first one starts, watches and ends. Use from one event loop.

    Args:
      blueprint: of all; each gets its own row.
      client: the first process's; it reports the deaths, and is failed when there are too many.
    """

    def __init__(self, blueprint: ApiProcess, client: Client):
        self._blueprint = blueprint
        self._client = client
        self._listeners: dict[int, socket.socket] = {}
        self._running: dict[int, _Running] = {}
        self._deaths: list[float] = []
        self._starts = 0
        self._told = False
        self._silent: set[int] = set()  # have never listened
        self._all_serve: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self, listeners: Sequence[socket.socket]) -> None:
        """One process for each listener, which is bound; `tell` closes them."""
        self._listeners = dict(enumerate(listeners, 1))
        self._silent = set(self._listeners)
        for row in self._listeners:
            self._start(row)

    async def all_serve(self, signals: Signals) -> bool:
        """Waits until each of them listens; False: a signal came first. Raises EngineDead if they cannot."""
        if self._silent:
            dead = asyncio.ensure_future(self._client.wait_dead())
            first = await first_done(self._all_serve, signals.first, dead)
            if first is dead:
                raise EngineDead(dead.result())
            dead.cancel()
        return not self._silent

    def tell(self, message: int | str) -> None:
        """A signal's number, or how the engine ended: they end as the first process does, and are not replaced."""
        self._told = True
        for listener in self._listeners.values():
            listener.close()
        for running in self._running.values():
            with contextlib.suppress(OSError):  # it has just ended
                running.control.send(message)

    async def stop(self, seconds: float) -> None:
        """Gives those that were told to end `seconds` for it, then kills what is left."""
        end = time.monotonic() + (seconds if self._told else 0)
        self._told = True
        loop = asyncio.get_running_loop()
        for running in self._running.values():
            loop.remove_reader(running.process.sentinel)
            loop.remove_reader(running.control.fileno())
            await asyncio.to_thread(running.process.join, max(0, end - time.monotonic()))
            running.process.kill()
            await asyncio.to_thread(running.process.join)
            running.close()

    def _start(self, row: int) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._starts += 1
        name = f"api{self._starts}"
        blueprint = dataclasses.replace(self._blueprint, row=row)
        process = start_process(f"pjengine-{name}", run_api_process, blueprint, name, self._listeners[row], theirs)
        theirs.close()
        self._running[row] = _Running(name, process, ours)
        loop = asyncio.get_running_loop()
        loop.add_reader(process.sentinel, self._ended, row)
        loop.add_reader(ours.fileno(), self._listens, row)

    def _listens(self, row: int) -> None:
        control = self._running[row].control
        asyncio.get_running_loop().remove_reader(control.fileno())
        with contextlib.suppress(EOFError):  # it has ended: `_ended` is next
            control.recv()
            self._silent.discard(row)
            if not self._silent and not self._all_serve.done():
                self._all_serve.set_result(None)

    def _ended(self, row: int) -> None:
        loop = asyncio.get_running_loop()
        running = self._running[row]
        loop.remove_reader(running.process.sentinel)
        loop.remove_reader(running.control.fileno())
        if self._told:
            return
        how = f"an API process {how_it_ended(running.process)}"
        running.close()
        del self._running[row]
        self._client.report_left(running.name)
        now = time.monotonic()
        self._deaths = [death for death in self._deaths if now - death < DEATHS_SECONDS] + [now]
        if len(self._deaths) < MOST_DEATHS:
            logger.error("%s; another takes its place", how)
            self._start(row)
            return
        reason = f"{how}, the last of {MOST_DEATHS} within {DEATHS_SECONDS:g} s; the lines above may say why"
        self._client.fail(reason)
        self.tell(reason)


@dataclasses.dataclass
class _Running:
    """A process, the name of its engine client, and our end of its control pipe."""

    name: str
    process: SpawnProcess
    control: Connection[int | str, None]

    def close(self) -> None:
        self.control.close()
        self.process.close()


def run_api_process(
    blueprint: ApiProcess, name: str, listener: socket.socket, control: Connection[None, int | str]
) -> None:
    """The entry of an API process.

    Args:
      name: of its engine client.
      listener: bound, on the port of all.
      control: says None once it listens; hears what `ApiProcesses.tell` is given.
    """
    become_child()
    configure_logging(blueprint.options.log_level)
    text = blueprint.load_text(blueprint.config)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        raise SystemExit(runner.run(_serve(blueprint, name, text, listener, control)))


async def _serve(
    blueprint: ApiProcess, name: str, text: TextSide, listener: socket.socket, control: Connection[None, int | str]
) -> int:
    loop = asyncio.get_running_loop()
    signals, client = Signals(), blueprint.connect(name)

    def hear() -> None:
        try:
            message = control.recv()
        except EOFError:  # the first process has ended, and so shall we
            loop.remove_reader(control.fileno())
            return
        if isinstance(message, int):
            signals.receive(message)
        else:
            client.fail(message)

    loop.add_reader(control.fileno(), hear)
    try:
        if not await engine_ready(client, signals):
            return 0
        context = make_context(client, text, blueprint.config, blueprint.options, blueprint.counters, blueprint.row)
        return await serve_http(context, blueprint.options, listener, signals, lambda: control.send(None))
    except PJEngineError:
        return 1  # the first process met it too, and says it
    finally:
        loop.remove_reader(control.fileno())
        await client.close()
