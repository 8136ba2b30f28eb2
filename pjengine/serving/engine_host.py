"""Starts the engine's process, watches it and ends it. Of several API processes, the first one holds it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pjengine.config import EngineConfig
from pjengine.serving.engine_process import MakeEngine, run_engine
from pjengine.serving.processes import how_it_ended, start_process

STOP_SECONDS = 5.0  # an engine that has not ended by then is killed
LAST_WORDS_SECONDS = 0.3  # for a Fatal with a better reason to arrive


class EngineHost:
    """The engine in a process of its own. Use from one event loop.

    Args:
      address: where API processes shall find it.
      on_end: called with how it ended, unless `stop` ended it.
    """

    def __init__(
        self,
        make_engine: MakeEngine,
        config: EngineConfig,
        address: str,
        log_level: str,
        on_end: Callable[[str], None],
    ):
        self._on_end = on_end
        self._process = start_process("pjengine-engine", run_engine, make_engine, config, address, log_level)
        asyncio.get_running_loop().add_reader(self._process.sentinel, self._ended)

    async def stop(self, asked: bool) -> None:
        """Ends the process: in good order where it has been asked to (the client's `stop_engine`), else at once."""
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        if asked:
            await asyncio.to_thread(self._process.join, STOP_SECONDS)
        self._process.kill()
        await asyncio.to_thread(self._process.join)
        self._process.close()

    def _ended(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._process.sentinel)
        loop.call_later(LAST_WORDS_SECONDS, self._on_end, f"the engine's process {how_it_ended(self._process)}")
