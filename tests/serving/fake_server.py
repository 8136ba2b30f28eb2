"""The real server on a fake engine: `python -m tests.serving.fake_server JSON`, written by live_server.fake_command."""

from __future__ import annotations

import functools
import json

import typer

from pjengine.config import EngineConfig
from pjengine.queue.options import QueueOptions
from pjengine.serving.cli_options import reported_errors
from pjengine.serving.server import run_server
from pjengine.serving.server_options import ServerOptions
from tests.serving.fake_engine import fail_to_start, load_text, make_fake_engine


def main(options: str) -> None:
    given = json.loads(options)
    fail = given.get("fail")
    make_engine = (
        functools.partial(fail_to_start, how=fail) if fail else functools.partial(make_fake_engine, **given["engine"])
    )
    server, config = ServerOptions(port=0, **given["server"]), EngineConfig(**{"model": "fake", **given["config"]})
    with reported_errors():
        queue = QueueOptions(**given["queue"]) if given.get("queue") else None
        raise typer.Exit(run_server(server, config, queue=queue, make_engine=make_engine, load_text=load_text))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
