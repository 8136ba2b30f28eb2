"""An API process's ZeroMQ socket to the engine, on its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import zmq

CONNECT_MILLISECONDS = 10  # between tries, while the engine's process starts
_IN = int(zmq.POLLIN)
_TURN = 64  # messages that are taken in before others on the loop have their turn


def has_message(socket: zmq.Socket[bytes]) -> bool:
    """Whether a receive would find one. Cheaper to ask than the exception of a receive in vain."""
    return bool(cast(int, socket.get(zmq.EVENTS)) & _IN)


class EngineSocket:
    """Messages out at once, messages in by callback. Use from one running event loop.

    Not zmq.asyncio: its futures and tasks cost each message as much as decoding and routing it.

    Args:
      address: the engine's.
      name: unique among those who connect to it.
      receive: called on the loop with each message, in order; raises nothing.
    """

    def __init__(self, address: str, name: str, receive: Callable[[bytes], None]):
        self._loop = asyncio.get_running_loop()
        self._receive = receive
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.setsockopt(zmq.RECONNECT_IVL, CONNECT_MILLISECONDS)
        self._socket.connect(address)
        self._loop.add_reader(self._socket.fileno(), self._read)

    def send(self, message: bytes) -> None:
        """Never waits: the send queue has no limit."""
        self._socket.send(message)
        # Sending takes note of what has come in, and the descriptor then stays silent about it.
        self._loop.call_soon(self._read)

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close(linger=0)
        self._context.term()

    def _read(self) -> None:
        for _ in range(_TURN):
            if self._socket.closed or not has_message(self._socket):
                return
            self._receive(self._socket.recv(zmq.NOBLOCK))
        self._loop.call_soon(self._read)
