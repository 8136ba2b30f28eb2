"""How Redis is reached: passwords, TLS, sockets, clusters."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pjengine.config import EngineConfig
from pjengine.engine_info import EngineInfo
from pjengine.errors import ConfigError, QueueUnavailable
from pjengine.queue.client_link import ClientLink, Item
from pjengine.queue.options import QueueOptions
from pjengine.queue.worker import run_worker
from pjengine.queue.worker_link import WorkerLink
from tests.queue.redis_server import RedisServer
from tests.serving.live_server import wait_for


def round_trip(options: QueueOptions) -> None:
    """All that the two sides say to Redis."""

    async def main() -> None:
        client, worker = ClientLink(options), WorkerLink(options)
        worker.ping()
        await client.join()
        assert worker.beat(EngineInfo("model", "embed", 100, 10)) == set()
        await client.submit([Item("a", False, 1, b"?"), Item("b", True, 1, b"?")], 10)
        worker.wait()
        claim = worker.claim(10, 10, 10)
        assert claim is not None
        assert worker.beat(EngineInfo("model", "embed", 100, 10), [claim.id, "other"]) == {"other"}
        assert worker.complete(claim.id, {"a": b"A", "b": b"B"}) == 2
        assert await client.results() == [b"A", b"B"]
        await client.cancel(["c"])
        status = await client.beat()
        assert (status.workers, status.counters["answered"]) == (1, 2)
        worker.leave()
        worker.close()
        await client.leave()
        await client.close()

    asyncio.run(main())


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with RedisServer(tmp_path, "--unixsocket", str(path)):
        round_trip(QueueOptions(url=f"unix://{path}"))


def test_password(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--requirepass", "s3cret") as server:
        round_trip(QueueOptions(url=f"redis://:s3cret@127.0.0.1:{server.port}/1"))


def test_tls(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    arguments = ["--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    with RedisServer(tmp_path, "--tls-auth-clients", "no", *arguments, tls=True) as server:
        round_trip(QueueOptions(url=f"rediss://localhost:{server.port}?ssl_ca_certs={certificate}"))


def test_cluster(tmp_path: Path) -> None:
    """A node that owns all slots refuses what spans them, so one hash tag holds all keys."""
    with RedisServer(tmp_path, "--cluster-enabled", "yes") as server:
        client = server.client()
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_for(lambda: "cluster_state:ok" in str(client.execute_command("CLUSTER", "INFO")))
        options = QueueOptions(url=f"redis+cluster://127.0.0.1:{server.port}")
        round_trip(options)

        async def lose_it() -> None:
            worker, client_side, info = WorkerLink(options), ClientLink(options), EngineInfo("model", "embed", 100, 10)
            worker.beat(info)
            await client_side.join()
            server.stop()
            for _ in range(2):
                with pytest.raises(QueueUnavailable, match="cannot be reached or used"):
                    worker.beat(info)
                with pytest.raises(QueueUnavailable, match="cannot be reached or used"):
                    await client_side.beat()
            await client_side.close()
            worker.close()

        asyncio.run(lose_it())


def test_a_cluster_that_is_none(options: QueueOptions) -> None:
    with pytest.raises(QueueUnavailable, match="Cluster mode is not enabled"):
        WorkerLink(QueueOptions(url=options.url.replace("redis://", "redis+cluster://")))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigError, match=r"pip install 'pjengine\[queue\]'"):
        WorkerLink(QueueOptions(url="redis://localhost"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:6379"}, "queue: expected a URL"),
        ({"url": "redis://host:port"}, "queue: redis://host:port cannot be used"),
        ({"url": "redis://[::1"}, "queue: redis://\\[::1 cannot be used"),
        ({"url": "redis://u:s3cr@t@h?foo=s3cret"}, "queue: redis://h cannot be used: .*foo"),
        ({"url": "redis://h", "name": "{a}"}, "queue_name: expected"),
        ({"url": "redis://h", "timeout": 0}, "queue_timeout: expected"),
        ({"url": "redis://h", "visibility": -1}, "visibility: expected"),
        ({"url": "redis://h", "max_deliveries": 0}, "max_deliveries: expected"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorkerLink(QueueOptions(**options))


def test_a_model_that_generates_is_refused_before_it_is_loaded(
    options: QueueOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*given: object) -> None:
        raise AssertionError("the model is being loaded")

    monkeypatch.setattr("pjengine.factory.make_engine", load)
    model = str(Path(__file__).parents[1] / "golden" / "llama")
    with pytest.raises(ConfigError, match="generates text; the queue is for models that embed or classify"):
        run_worker(options, EngineConfig.make(model))
