"""A server in a process of its own, for tests that speak HTTP to it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import openai

ROOT = Path(__file__).parents[2]
# SmolLM2's engine where a test asks for no other: the first to start it compiles, the others find that in the cache.
SMOLLM_ENGINE = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "64"]
SMOLLM_ENGINE += ["--num-pages", "1200", "--page-size", "16"]


@dataclasses.dataclass
class LiveServer:
    """A running server.

    Attributes:
      url: without a path.
      process: of the API; the engine's is its child.
    """

    url: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    http: httpx.Client = dataclasses.field(default_factory=lambda: httpx.Client(timeout=60))

    @property
    def log(self) -> str:
        self.output.seek(0)
        return self.output.read().decode()

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "http_client": self.http, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return self.http.post(self.url + path, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(self.url + path, **options)

    def metrics(self) -> dict[str, float]:
        """Series (with their labels) and values."""
        lines = [line for line in self.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def engine_pid(self) -> int:
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            if "resource_tracker" not in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
        raise RuntimeError("the engine's process is not there")

    def wait_idle(self, seconds: float = 10) -> dict[str, float]:
        """Waits until nothing runs or waits and no page is held; returns the metrics."""

        def idle() -> bool:
            found = self.metrics()
            names = ("requests_running", "requests_waiting", "kv_cache_used_pages")
            return all(found[f"pjengine_{name}"] == 0 for name in names)

        wait_for(idle, seconds)
        return self.metrics()


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    """Polls until the condition holds; TimeoutError otherwise."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.02)


@contextlib.contextmanager
def running(command: list[str], seconds: float = 60, **environment: str) -> Iterator[LiveServer]:
    """Starts a server, waits until it says where it listens, and stops it at the end."""
    with tempfile.TemporaryFile() as output:
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=environ, cwd=ROOT)
        server = LiveServer("", process, output)
        try:
            wait_for(lambda: process.poll() is not None or " on http://" in server.log, seconds)
            address = re.search(r" on (http://\S+)", server.log)
            if address is None:
                raise RuntimeError(f"the server did not start:\n{server.log}")
            server.url = address[1]
            wait_for(lambda: _listens(server.url))
            yield server
        finally:
            server.http.close()
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                finally:
                    process.kill()
                    process.wait()


def fake_command(
    fail: str | None = None,
    config: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    queue: dict[str, Any] | None = None,
    **server: Any,
) -> list[str]:
    """The command line of a server on the fake engine; further arguments are ServerOptions' fields."""
    options = {"server": server, "config": config or {}, "engine": engine or {}, "queue": queue, "fail": fail}
    return ["-m", "tests.serving.fake_server", json.dumps(options)]


def _listens(url: str) -> bool:
    with contextlib.suppress(httpx.ConnectError):
        httpx.get(f"{url}/health", timeout=10)
        return True
    return False
