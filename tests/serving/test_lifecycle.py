"""Clients that leave, an engine that dies, signals, failures at the start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.serving.live_server import ROOT, LiveServer, fake_command, running, wait_for

SLOW = {"step_seconds": 0.02}  # 400 tokens take 8 s


@pytest.fixture(scope="module")
def slow() -> Iterator[LiveServer]:
    with running(fake_command(engine=SLOW)) as live:
        yield live


@pytest.fixture
def fresh() -> Iterator[LiveServer]:
    """For tests that end it."""
    with running(fake_command(engine=SLOW)) as live:
        yield live


def test_a_client_that_leaves_a_stream_frees_its_pages(slow: LiveServer) -> None:
    stream = slow.client().completions.create(model="fake", prompt="a", max_tokens=400, n=3, stream=True)
    next(iter(stream))
    wait_for(lambda: slow.metrics()["pjengine_requests_running"] == 3)
    left = time.monotonic()
    stream.close()
    slow.wait_idle()
    assert time.monotonic() - left < 2  # the sequences had 8 s to go
    assert slow.metrics()['pjengine_requests_finished_total{finish_reason="abort"}'] >= 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token(slow: LiveServer, stream: bool) -> None:
    body = {"prompt": "<quiet>", "max_tokens": 400, "stream": stream, "stop": "<quiet><quiet><"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{slow.url}/v1/completions", json=body, timeout=0.3)
    left = time.monotonic()
    slow.wait_idle()
    assert time.monotonic() - left < 2


def test_a_client_that_leaves_the_embedding_queue() -> None:
    with running(fake_command(engine={"kind": "embed", "step_seconds": 1.0, "max_running": 1})) as live:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.url}/v1/embeddings", json={"input": ["a"] * 20}, timeout=0.5)
        live.wait_idle(5)


def test_kill_9_of_a_client(slow: LiveServer) -> None:
    code = (
        "import sys, httpx\n"
        "with httpx.stream('POST', sys.argv[1], json={'prompt': 'a', 'max_tokens': 400, 'stream': True}) as answer:\n"
        "    for line in answer.iter_lines(): print(line, flush=True)\n"
    )
    command = [sys.executable, "-c", code, f"{slow.url}/v1/completions"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline().startswith(b"data: ")
        deadline = time.monotonic() + 5  # figures reach the API process a moment after tokens do
        while slow.metrics()["pjengine_requests_running"] != 1:
            assert time.monotonic() < deadline
        client.kill()
        killed = time.monotonic()
        slow.wait_idle()
        assert time.monotonic() - killed < 2


def test_a_client_that_leaves_while_it_sends(slow: LiveServer) -> None:
    host, port = slow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert slow.get("/health").status_code == 200
    assert "Traceback" not in slow.log


def open_requests(server: LiveServer) -> tuple[ThreadPoolExecutor, list[Any]]:
    """Three open requests: a stream of a completion, one of a chat, and one that is not streamed."""
    client = server.client()
    chat: list[Any] = [{"role": "user", "content": "a"}]
    calls = [
        lambda: list(client.completions.create(model="fake", prompt="a", max_tokens=400, stream=True)),
        lambda: list(client.chat.completions.create(model="fake", messages=chat, max_tokens=400, stream=True)),
        lambda: client.completions.create(model="fake", prompt="a", max_tokens=400),
    ]
    pool = ThreadPoolExecutor(len(calls))
    futures = [pool.submit(call) for call in calls]
    wait_for(lambda: server.metrics()["pjengine_requests_running"] == 3)
    return pool, futures


def check_death(server: LiveServer, futures: list[Any]) -> list[str]:
    """Every open request gets an error, health turns 503, the server ends with code 1. Returns the errors."""
    wait_for(lambda: server.get("/health").status_code == 503, 2)
    refused = server.post("/v1/completions", {"prompt": "a"})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_dead"
    errors = [future.exception(10) for future in futures]
    assert all(isinstance(error, openai.APIError) for error in errors), errors
    assert isinstance(errors[-1], openai.InternalServerError)
    assert errors[-1].status_code == 503
    assert server.process.wait(10) == 1
    return [str(error) for error in errors]


def test_kill_9_of_the_engine(fresh: LiveServer) -> None:
    pool, futures = open_requests(fresh)
    with pool:
        os.kill(fresh.engine_pid(), signal.SIGKILL)
        errors = check_death(fresh, futures)
    assert all("SIGKILL" in error for error in errors)
    assert "Traceback" not in fresh.log


def test_an_exception_in_the_engine(fresh: LiveServer) -> None:
    pool, futures = open_requests(fresh)
    with pool:
        assert fresh.post("/v1/completions", {"prompt": "<crash>"}).status_code == 503
        errors = check_death(fresh, futures)
    assert all("RuntimeError: the script says so" in error for error in errors)
    assert "in _advance" in fresh.log  # the engine's own traceback, for us


def test_kill_9_of_the_api_ends_the_engine(fresh: LiveServer) -> None:
    engine = fresh.engine_pid()
    fresh.process.kill()
    fresh.process.wait()
    wait_for(lambda: not _exists(engine))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_draining_under_load(fresh: LiveServer, number: signal.Signals) -> None:
    client = fresh.client()
    engine = fresh.engine_pid()
    with ThreadPoolExecutor(8) as pool:
        futures = [
            pool.submit(
                lambda: "".join(
                    c.choices[0].text
                    for c in client.completions.create(model="fake", prompt="ab", max_tokens=60, stream=True)
                )
            )
            for _ in range(8)
        ]
        wait_for(lambda: fresh.metrics()["pjengine_requests_running"] == 8)
        os.kill(engine, number)  # as Ctrl-C and service managers do it: to the whole group
        fresh.process.send_signal(number)
        wait_for(lambda: fresh.get("/health").status_code == 503, 1)
        refused = fresh.post("/v1/completions", {"prompt": "a"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) > 0
        assert [future.result() for future in futures] == ["ab" * 30] * 8
    assert fresh.process.wait(5) == 0
    assert not _exists(engine)
    assert "Traceback" not in fresh.log


def test_the_grace_time_ends() -> None:
    with running(fake_command(engine=SLOW, shutdown_grace=0.3)) as live:
        pool, futures = open_requests(live)
        with pool:
            live.process.send_signal(signal.SIGTERM)
            assert live.process.wait(5) == 0
            errors = [future.exception(5) for future in futures]
        assert all("shutting down" in str(error) for error in errors)
        assert {getattr(error, "code", None) for error in errors} == {"shutting_down"}


def test_a_second_signal_stops_at_once(fresh: LiveServer) -> None:
    pool, futures = open_requests(fresh)
    with pool:
        fresh.process.send_signal(signal.SIGTERM)
        wait_for(lambda: fresh.get("/health").status_code == 503)
        fresh.process.send_signal(signal.SIGINT)
        assert fresh.process.wait(3) == 128 + signal.SIGINT
        assert all(future.exception(5) is not None for future in futures)


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("model", "pjengine: error: model: no weights in /nowhere\n"),
        ("memory", "pjengine: error: weights take 80 GiB, the device has 24 GiB\n"),
    ],
)
def test_an_engine_that_cannot_start_says_why(fail: str, message: str) -> None:
    done = subprocess.run([sys.executable, *fake_command(fail)], cwd=ROOT, capture_output=True, timeout=60, text=True)
    assert done.returncode == 1
    assert done.stderr == message
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("fail", "message"), [("bug", "failed to start: KeyError: 'forgotten'"), ("killed", "was killed by SIGKILL")]
)
def test_an_engine_that_fails_at_the_start(fail: str, message: str) -> None:
    done = subprocess.run([sys.executable, *fake_command(fail)], cwd=ROOT, capture_output=True, timeout=60, text=True)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert ("Traceback" in done.stderr) == (fail == "bug")


def test_a_signal_while_it_starts() -> None:
    with subprocess.Popen([sys.executable, *fake_command("hang")], cwd=ROOT, stderr=subprocess.PIPE) as process:
        live = LiveServer("", process, None)  # type: ignore[arg-type]
        wait_for(lambda: _engine_runs(live))
        engine = live.engine_pid()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert not _exists(engine)


def test_a_port_in_use_is_known_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "pjengine", "serve", "/no/such/model", "--port", str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"pjengine: error: host, port: cannot listen on 127.0.0.1:{port}: "
        "Address already in use; choose another --port\n"
    )


def test_many_clients_at_once(server: LiveServer) -> None:
    """Each gets its own text."""
    client = server.client()

    def call(i: int) -> str:
        stream = client.completions.create(model="fake", prompt=f"<{i}>", max_tokens=40, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(call, range(128)))
    assert found == [(f"<{i}>" * 40)[:40] for i in range(128)]
    server.wait_idle()


def _exists(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _engine_runs(live: LiveServer) -> bool:
    try:
        live.engine_pid()
    except (RuntimeError, FileNotFoundError):
        return False
    return True
