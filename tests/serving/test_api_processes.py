"""Several API processes on one port: spread, shared metrics, deaths and ends."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from pjengine.config import EngineConfig
from pjengine.errors import PJEngineError
from pjengine.serving.api_processes import MOST_DEATHS
from pjengine.serving.engine_client import EngineClient
from pjengine.serving.engine_host import EngineHost
from pjengine.serving.engine_process import FIRST_CLIENT
from tests.serving.fake_engine import fail_to_start
from tests.serving.live_server import ROOT, LiveServer, fake_command, running, wait_for
from tests.serving.test_lifecycle import check_death, open_requests

PROCESSES = 2
SLOW = {"step_seconds": 0.01}


@pytest.fixture(scope="module")
def several() -> Iterator[LiveServer]:
    with running(fake_command(api_processes=PROCESSES)) as live:
        yield live


@pytest.fixture
def fresh() -> Iterator[LiveServer]:
    """For tests that end it."""
    with running(fake_command(engine=SLOW, api_processes=PROCESSES)) as live:
        yield live


def children(live: LiveServer) -> list[int]:
    """Of the first process, in order of start: the engine's, then API processes'."""
    pids = Path(f"/proc/{live.process.pid}/task/{live.process.pid}/children").read_text().split()
    return [int(pid) for pid in pids if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]


def connections(pid: int, port: int) -> int:
    """Open TCP connections of a process to our port."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(fd).removeprefix("socket:[").rstrip("]"))
        except FileNotFoundError:
            continue
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[9] in inodes and row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def test_connections_are_spread_and_each_client_gets_its_own(several: LiveServer) -> None:
    port = int(several.url.rsplit(":", 1)[1])
    pids = [several.process.pid, *children(several)[1:]]
    assert len(pids) == PROCESSES
    with httpx.Client(limits=httpx.Limits(max_connections=64), timeout=30) as http, ThreadPoolExecutor(64) as pool:

        def call(i: int) -> str:
            body = {"prompt": f"<{i}>", "max_tokens": 40}
            return str(http.post(f"{several.url}/v1/completions", json=body).json()["choices"][0]["text"])

        assert list(pool.map(call, range(192))) == [(f"<{i}>" * 40)[:40] for i in range(192)]
        held = [connections(pid, port) for pid in pids]
        assert min(held) > 0, held


def test_metrics_are_those_of_all_processes(several: LiveServer) -> None:
    series = 'pjengine_requests_finished_total{finish_reason="length"}'
    before = several.metrics()[series]
    limits = httpx.Limits(max_keepalive_connections=0)  # a connection each, so that each process gets some
    with httpx.Client(limits=limits, base_url=several.url) as http:
        for _ in range(20):
            assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        found = {http.get("/metrics").text.split(f"{series} ")[1].split()[0] for _ in range(9)}
    assert found == {str(before + 20)}


@pytest.mark.parametrize("processes", [1, 2])
def test_every_process_knows_the_figures_before_it_listens(processes: int) -> None:
    """Else a scrape of a process that has just taken another's place would see counters fall."""
    limits = httpx.Limits(max_keepalive_connections=0)
    with running(fake_command(api_processes=processes)) as live, httpx.Client(limits=limits) as http:
        found = [http.get(f"{live.url}/metrics").text for _ in range(9)]
    assert all("pjengine_kv_cache_total_pages 1000.0" in text for text in found)


def test_an_api_process_that_dies_is_replaced_and_the_engine_is_not(fresh: LiveServer) -> None:
    engine, *others = children(fresh)
    pool = ThreadPoolExecutor(24)
    limits = httpx.Limits(max_keepalive_connections=0)
    with pool, httpx.Client(limits=limits, base_url=fresh.url, timeout=30) as http:
        body = {"prompt": "ab", "max_tokens": 300}
        futures = [pool.submit(http.post, "/v1/completions", json=body) for _ in range(24)]
        wait_for(lambda: fresh.metrics()["pjengine_requests_running"] == 24)
        os.kill(others[0], signal.SIGKILL)
        lost = [future for future in futures if isinstance(future.exception(), httpx.TransportError)]
        assert all(
            future.result().json()["choices"][0]["text"] == "ab" * 150 for future in futures if future not in lost
        )
        assert 0 < len(lost) < 24
        wait_for(lambda: len(children(fresh)) == PROCESSES)
        assert fresh.wait_idle()["pjengine_kv_cache_used_pages"] == 0  # what the dead process left was aborted
        for _ in range(12):  # none of them meets a closed door
            assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    assert children(fresh)[0] == engine
    assert "was killed by SIGKILL; another takes its place" in fresh.log

    pool, open_ones = open_requests(fresh)
    with pool:
        pids = children(fresh)
        os.kill(engine, signal.SIGKILL)
        errors = check_death(fresh, open_ones)
    assert all("SIGKILL" in error for error in errors)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_processes_that_keep_dying_end_the_server(fresh: LiveServer) -> None:
    for _ in range(MOST_DEATHS):
        wait_for(lambda: len(children(fresh)) == PROCESSES)
        os.kill(children(fresh)[-1], signal.SIGKILL)
        wait_for(lambda: "SIGKILL" in fresh.log)
        fresh.output.seek(0)
        fresh.output.truncate()
    assert fresh.process.wait(10) == 1


def test_the_death_of_the_first_process_ends_all(fresh: LiveServer) -> None:
    pids = children(fresh)
    fresh.process.kill()
    fresh.process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_draining_in_every_process(fresh: LiveServer) -> None:
    pids = children(fresh)
    with ThreadPoolExecutor(12) as pool:
        body = {"prompt": "ab", "max_tokens": 300}
        futures = [pool.submit(fresh.post, "/v1/completions", body) for _ in range(12)]
        wait_for(lambda: fresh.metrics()["pjengine_requests_running"] == 12)
        for pid in (*pids, fresh.process.pid):  # as Ctrl-C reaches the whole group
            os.kill(pid, signal.SIGINT)
        assert {future.result().json()["choices"][0]["text"] for future in futures} == {"ab" * 150}
    assert fresh.process.wait(10) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert "Traceback" not in fresh.log


def test_an_engine_that_cannot_start_says_so_once() -> None:
    command = fake_command("memory", api_processes=PROCESSES)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, timeout=60, text=True)
    assert (done.returncode, done.stderr) == (1, "pjengine: error: weights take 80 GiB, the device has 24 GiB\n")


def test_the_first_process_hears_why_though_another_said_hello_before(tmp_path: Path) -> None:
    async def start() -> None:
        ended: list[str] = []
        address = f"ipc://{tmp_path / 'engine'}"
        other = EngineClient(address, "api1")
        fail = functools.partial(fail_to_start, how="memory")
        host = EngineHost(fail, EngineConfig(model="fake"), address, "error", ended.append)
        try:
            await asyncio.sleep(1)
            assert ended == []
            first = EngineClient(address, FIRST_CLIENT)
            for client in (first, other):
                with pytest.raises(PJEngineError, match="weights take 80 GiB"):
                    await asyncio.wait_for(client.wait_ready(), 20)
                await client.close()
        finally:
            await host.stop(asked=False)

    asyncio.run(start())


def test_a_port_is_not_shared_with_another_server(several: LiveServer) -> None:
    port = int(several.url.rsplit(":", 1)[1])
    command = ["-m", "pjengine", "serve", "/no/such/model", "--port", str(port), "--api-processes", "2"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, timeout=60, text=True)
    assert done.returncode == 1
    assert "Address already in use; choose another --port" in done.stderr
    with socket.create_connection(("127.0.0.1", port)):
        pass
