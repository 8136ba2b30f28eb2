"""redis-server as a child process."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any, Self

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.serving.live_server import wait_for


class RedisServer:
    """A server with nothing on disk; it forgets all when it is stopped.

    Args:
      directory: its working directory.
      arguments: further ones of its command line.
      tls: it speaks nothing else.
    """

    def __init__(self, directory: Path, *arguments: str, tls: bool = False):
        if shutil.which("redis-server") is None:
            pytest.fail("redis-server is not installed; scripts/test installs it (Debian's package redis-server)")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._tls = tls
        ports = ("--port", "0", "--tls-port", str(self.port)) if tls else ("--port", str(self.port))
        self._command = [
            *("redis-server", *ports, "--bind", "127.0.0.1", "--dir", str(directory)),
            *("--save", "", "--appendonly", "no", *arguments),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def client(self) -> Any:
        """Of redis-py, whose annotations mix bytes and str."""
        tls: dict[str, Any] = {"ssl": True, "ssl_cert_reqs": None, "ssl_check_hostname": False} if self._tls else {}
        return redis.Redis(port=self.port, retry=Retry(NoBackoff(), 0), **tls)

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        try:
            with self.client() as client:
                wait_for(lambda: _answers(client))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _answers(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.ConnectionError as error:
        return isinstance(error, redis.AuthenticationError)
    return True
