"""The phases of a start-up and their times."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator


class PhaseLog(logging.Handler):
    """Collects the ends of phases that the engine logs: records with an attribute `phase`.

    Attributes:
      ends: (phase, seconds of `time.monotonic` at its end), in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[tuple[str, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (phase := getattr(record, "phase", None)) is not None:
            self.mark(phase)

    def mark(self, phase: str) -> None:
        self.ends.append((phase, time.monotonic()))

    def seconds(self, start: float) -> dict[str, float]:
        """Of each phase, the first from `start` on, each later one from the end of the one before."""
        ends = [start, *(at for _, at in self.ends)]
        return {phase: end - before for (phase, end), before in zip(self.ends, ends, strict=False)}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Listens to all of pjengine meanwhile."""
        package = logging.getLogger("pjengine")
        # A program that has no handlers sees warnings by the last resort, which is none any more once there is one.
        added = [self] if package.hasHandlers() else [self, logging.lastResort]
        handlers = [handler for handler in added if handler is not None]
        for handler in handlers:
            package.addHandler(handler)
        try:
            yield
        finally:
            for handler in handlers:
                package.removeHandler(handler)
