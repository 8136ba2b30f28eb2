"""Workers in processes of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import IO

from pjengine.queue.options import QueueOptions
from tests.serving.live_server import ROOT, wait_for


@dataclasses.dataclass
class LiveWorker:
    process: subprocess.Popen[bytes]
    output: IO[bytes]

    @property
    def log(self) -> str:
        self.output.seek(0)
        return self.output.read().decode()

    @property
    def id(self) -> str:
        """Its name in the queue."""
        found = re.search(r"worker (\w+): .* tokens a batch", self.log)
        assert found is not None
        return found[1]

    def wait_ready(self, seconds: float = 60) -> None:
        """Until it works on the queue; RuntimeError if it ends instead."""
        wait_for(lambda: " tokens a batch" in self.log or self.process.poll() is not None, seconds)
        if self.process.poll() is not None:
            raise RuntimeError(f"the worker ended:\n{self.log}")


class Workers(contextlib.ExitStack):
    """Starts workers; those that still run at the end are killed."""

    def start(self, command: list[str]) -> LiveWorker:
        output = self.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=environment, cwd=ROOT)
        self.callback(process.wait)
        self.callback(process.kill)
        return LiveWorker(process, output)

    def start_fake(
        self,
        options: QueueOptions,
        count: int = 1,
        model: str = "fake",
        step_seconds: float = 0.01,
        revision: str = "",
    ) -> list[LiveWorker]:
        """Workers with a batch of 64 tokens or 16 items, ready."""
        given = {
            "queue": dataclasses.asdict(options),
            "model": model,
            "step_seconds": step_seconds,
            "revision": revision,
        }
        workers = [self.start(["-m", "tests.queue.fake_worker", json.dumps(given)]) for _ in range(count)]
        for worker in workers:
            worker.wait_ready()
        return workers
