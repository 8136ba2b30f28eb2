"""Garbage collection in a process that runs one engine until it ends."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Puts all objects of now out of the garbage collector's sight.

    Modules and traced programs, some 200,000 objects, stay until the process ends; looking through them again would
    hold up every request for a quarter of a second each time. Not for a process that may drop its engine: what is
    frozen in a cycle is never freed.
    """
    gc.freeze()


def freeze_heap_again() -> None:
    """`freeze_heap` where it has been called before: programs are also traced while an engine serves."""
    if gc.get_freeze_count():
        gc.freeze()
