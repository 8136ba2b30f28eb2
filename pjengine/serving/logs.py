"""Logging of both processes."""

from __future__ import annotations

import logging


def configure_logging(level: str) -> None:
    """pjengine's own messages from `level` on, other libraries' warnings, all on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(name)s: %(message)s")
    logging.getLogger("pjengine").setLevel(level.upper())
