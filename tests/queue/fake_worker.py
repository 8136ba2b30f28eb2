"""The real worker on a fake engine: `python -m tests.queue.fake_worker JSON`, written by workers.fake_worker."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys

import typer

from pjengine.config import EngineConfig
from pjengine.queue.options import QueueOptions
from pjengine.queue.worker import run_worker
from pjengine.serving.cli_options import reported_errors
from pjengine.serving.logs import configure_logging
from tests.serving.fake_engine import FakeEngine


@dataclasses.dataclass
class FakeLimits:
    budget: int
    max_rows: int


class FakeBatchEngine(FakeEngine):
    """The fake engine, with the limits of its batches."""

    def __init__(self, config: EngineConfig, step_seconds: float, revision: str):
        self.runner = FakeLimits(budget=64, max_rows=16)
        super().__init__(config, "embed", step_seconds, self.runner.max_rows, labels=())
        self.info = dataclasses.replace(self.info, revision=revision)


def main() -> None:
    given = json.loads(sys.argv[1])
    configure_logging("info")
    how = {name: given[name] for name in ("step_seconds", "revision")}
    make_engine = functools.partial(FakeBatchEngine, **how)
    with reported_errors():
        raise typer.Exit(run_worker(QueueOptions(**given["queue"]), EngineConfig(model=given["model"]), make_engine))


if __name__ == "__main__":
    try:
        main()
    except typer.Exit as end:
        sys.exit(end.exit_code)
