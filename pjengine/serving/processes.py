"""Child processes of the server: they leave signals to it, and end when it ends."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess


def start_process(name: str, target: Callable[..., None], *arguments: object) -> SpawnProcess:
    """Starts a process that never sees SIGINT or SIGTERM: they are blocked, and the mask is inherited.

    Ctrl-C and service managers signal the whole group; it is the server's first process that decides what follows.
    """
    blocked = {signal.SIGINT, signal.SIGTERM}
    resource_tracker.ensure_running()  # it would unblock both if it were started by `start`
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, name=name)
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    return process


def become_child() -> None:
    """To be called first in a child: it ignores signals that are sent to it alone, and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def how_it_ended(process: SpawnProcess) -> str:
    """Of a process that has ended: "ended with code 1", "was killed by SIGKILL"."""
    process.join()
    code = process.exitcode or 0
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _exit_with_parent() -> None:
    """What is left of a server without its first process serves nobody and may hold the device: it ends at once."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
