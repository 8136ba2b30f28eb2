"""Servers and workers on a queue, each in its own process, with a fake engine that needs no JAX."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import signal
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from pjengine.queue.options import QueueOptions
from pjengine.queue.scripts import keys_of
from tests.queue.redis_server import RedisServer
from tests.queue.workers import Workers
from tests.serving.live_server import LiveServer, fake_command, running, wait_for


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers() as workers:
        yield workers


@contextlib.contextmanager
def front_door(options: QueueOptions, **further: Any) -> Iterator[LiveServer]:
    with running(fake_command(queue=dataclasses.asdict(options), **further)) as server:
        yield server


def embed(server: LiveServer, *token_ids: list[int]) -> httpx.Response:
    return server.post("/v1/embeddings", {"input": list(token_ids), "encoding_format": "base64"})


def is_right(answer: httpx.Response, *token_ids: list[int]) -> bool:
    vectors = [struct.unpack("<4f", base64.b64decode(entry["embedding"])) for entry in answer.json()["data"]]
    return [vector[:3] for vector in vectors] == [(len(ids), ids[0], ids[-1]) for ids in token_ids]


def test_requests_are_shared_and_answered(options: QueueOptions, workers: Workers) -> None:
    workers.start_fake(options, 2)
    with front_door(options, api_processes=2) as server:
        many = [[i % 250, 1 + i % 7] for i in range(300)]
        answer = embed(server, *many)
        assert is_right(answer, *many)
        assert answer.json()["usage"]["prompt_tokens"] == 600
        assert server.get("/health").status_code == 200
        assert server.get("/v1/models").json()["data"][0]["max_model_len"] == 512
        too_long = server.post("/v1/embeddings", {"input": [1] * 513})
        assert too_long.status_code == 400
        assert "window of 512" in too_long.json()["error"]["message"]
        failing = server.post("/v1/embeddings", {"input": ["a", "<fail>"]})
        assert (failing.status_code, failing.json()["error"]["message"]) == (500, "this request cannot be computed")
        wait_for(lambda: server.metrics()["pjengine_queue_answered_total"] == 302)
        found = server.metrics()
        assert found["pjengine_queue_workers"] == 2
        assert found["pjengine_queue_submitted_total"] == 302
        assert found["pjengine_queue_claims_total"] >= 300 / 16
        assert found["pjengine_request_queue_seconds_count"] >= 300
        assert 0 < found["pjengine_request_queue_seconds_sum"] <= found["pjengine_request_latency_seconds_sum"]
        assert found["pjengine_queue_redelivered_total"] == found['pjengine_queue_waiting{class="query"}'] == 0


def test_a_killed_worker_loses_nothing(options: QueueOptions, redis_server: RedisServer, workers: Workers) -> None:
    options = dataclasses.replace(options, visibility=0.5)
    first, *_ = workers.start_fake(options, 3, step_seconds=0.05)
    claims = keys_of(options.name)[4]

    def holds_claims() -> bool:
        return any(claim.decode().startswith(first.id) for claim in redis_server.client().zrange(claims, 0, -1))

    with front_door(options) as server, ThreadPoolExecutor(16) as pool:
        inputs = [[[i % 256, 2, j] for j in range(10)] for i in range(150)]
        answers = [pool.submit(embed, server, *each) for each in inputs]
        wait_for(holds_claims)
        first.process.kill()
        for answer, each in zip(answers, inputs, strict=True):
            assert answer.result().status_code == 200
            assert is_right(answer.result(), *each)
        wait_for(lambda: server.metrics()["pjengine_queue_answered_total"] == 1500)
        wait_for(lambda: server.metrics()["pjengine_queue_workers"] == 2)
        found = server.metrics()
        assert found["pjengine_queue_lapsed_claims_total"] >= 1
        assert found["pjengine_queue_redelivered_total"] >= 1


def test_a_request_that_kills_workers_is_refused_alone(options: QueueOptions, workers: Workers) -> None:
    options = dataclasses.replace(options, visibility=0.3)
    workers.start_fake(options, 4, step_seconds=0.05)
    with front_door(options) as server, ThreadPoolExecutor(8) as pool:
        poison = pool.submit(server.post, "/v1/embeddings", {"input": "<die>"})
        innocent = [pool.submit(embed, server, [i, i]) for i in range(20)]
        assert all(is_right(answer.result(), [i, i]) for i, answer in enumerate(innocent))
        refused = poison.result()
        assert refused.status_code == 500
        assert refused.json()["error"]["message"] == "input: given up: the worker that had it died, 3 times"
        wait_for(lambda: server.metrics()["pjengine_queue_workers"] == 1)
        assert server.metrics()["pjengine_queue_poisoned_total"] == 1


def test_redis_lost_and_found(own_redis: RedisServer, workers: Workers) -> None:
    options = QueueOptions(url=own_redis.url, visibility=2)
    (worker,) = workers.start_fake(options, step_seconds=0.3)
    with front_door(options) as server, ThreadPoolExecutor(4) as pool:
        assert embed(server, [1]).status_code == 200
        waiting = [pool.submit(embed, server, [1, 2]) for _ in range(4)]
        wait_for(lambda: own_redis.client().hlen(keys_of("default")[0]) == 4)
        own_redis.stop()
        for answer in [*(each.result() for each in waiting), embed(server, [1])]:
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "queue_unavailable"
        assert server.get("/health").status_code == 503
        own_redis.start()
        wait_for(lambda: server.get("/health").status_code == 200)
        assert is_right(embed(server, [3, 4]), [3, 4])
        assert "the queue is back" in server.log
        assert worker.process.poll() is None


def test_redis_that_forgets_all(own_redis: RedisServer, workers: Workers) -> None:
    """As after FLUSHALL or eviction: what was open gets 503, and all goes on."""
    options = QueueOptions(url=own_redis.url, visibility=1)
    workers.start_fake(options, step_seconds=0.5)
    with front_door(options) as server, ThreadPoolExecutor(1) as pool:
        open_request = pool.submit(embed, server, *([i] for i in range(64)))
        wait_for(lambda: own_redis.client().hlen(keys_of("default")[0]))
        own_redis.client().flushall()
        assert open_request.result().status_code == 503
        wait_for(lambda: server.get("/health").status_code == 200)
        assert is_right(embed(server, [3, 4]), [3, 4])


def test_a_full_queue_refuses_all_of_a_request(
    options: QueueOptions, redis_server: RedisServer, workers: Workers
) -> None:
    workers.start_fake(options, step_seconds=0.4)
    with front_door(options, config={"max_waiting": 50}) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(embed, server, *([i] for i in range(50)))
        wait_for(lambda: redis_server.client().hlen(keys_of(options.name)[0]) == 50)
        refused = embed(server, *([i] for i in range(45)))
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "overloaded"
        assert first.result().status_code == 200
        wait_for(lambda: server.metrics()["pjengine_queue_refused_total"] == 45)


def test_timeouts_and_clients_that_leave(options: QueueOptions, workers: Workers) -> None:
    """With the only worker stopped as by a debugger: it neither computes nor dies for the queue."""
    options = dataclasses.replace(options, timeout=1.5, visibility=30)
    (worker,) = workers.start_fake(options)
    with front_door(options) as server:
        worker.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(httpx.ReadTimeout):
                server.post("/v1/embeddings", {"input": [[1], [2]]}, timeout=0.5)
            wait_for(lambda: server.metrics()["pjengine_queue_cancelled_total"] == 2)
            late = embed(server, [1])
            assert late.status_code == 504
            assert late.json()["error"]["code"] == "deadline_exceeded"
        finally:
            worker.process.send_signal(signal.SIGCONT)
        assert is_right(embed(server, [5]), [5])
        wait_for(lambda: server.metrics()["pjengine_queue_expired_total"] == 1)


def test_a_server_that_dies_leaves_nothing_behind(
    options: QueueOptions, redis_server: RedisServer, workers: Workers
) -> None:
    workers.start_fake(options, step_seconds=0.1)
    with ThreadPoolExecutor(1) as pool, front_door(options) as server:
        pool.submit(embed, server, *([1] for _ in range(200)))
        items = keys_of(options.name)[0]
        wait_for(lambda: redis_server.client().hlen(items) > 0)
        server.process.kill()
    clients = keys_of(options.name)[7]
    for client in redis_server.client().zrange(clients, 0, -1):
        redis_server.client().zadd(clients, {client: 1}, xx=True)  # its lease ends
    wait_for(lambda: redis_server.client().hlen(items) == 0)
    left = {key.decode().rpartition(":")[2] for key in redis_server.client().keys(f"*{{pjengine:{options.name}}}*")}
    assert left <= {"counters", "model", "workers", "wake"}


def test_a_worker_told_to_end_ends_its_batches(options: QueueOptions, workers: Workers) -> None:
    first, _ = workers.start_fake(options, 2, step_seconds=0.1)
    with front_door(options) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(embed, server, *([i] for i in range(200)))
        wait_for(lambda: server.metrics()["pjengine_queue_answered_total"] > 0)
        first.process.terminate()
        assert first.process.wait(10) == 0
        assert answer.result().status_code == 200
        wait_for(lambda: server.metrics()["pjengine_queue_workers"] == 1)
        assert server.metrics()["pjengine_queue_redelivered_total"] == 0


def test_without_workers_requests_are_refused(options: QueueOptions, workers: Workers) -> None:
    (worker,) = workers.start_fake(options)
    with front_door(options) as server:
        worker.process.terminate()
        worker.process.wait(10)
        wait_for(lambda: server.get("/health").status_code == 503)
        answer = embed(server, [1])
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_unavailable")
        assert "no worker is alive" in answer.json()["error"]["message"]


def test_a_worker_of_another_model_is_turned_away(options: QueueOptions, workers: Workers) -> None:
    workers.start_fake(options)
    with pytest.raises(RuntimeError, match=r"queue_name: workers of the queue .* serve model 'fake' \(here 'other'\)"):
        workers.start_fake(options, model="other")
    with pytest.raises(RuntimeError, match=r"serve revision '' \(here 'new'\); give this model a queue"):
        workers.start_fake(options, revision="new")
    with (
        pytest.raises(RuntimeError, match=r"model: the workers of the queue .* serve fake, not other"),
        front_door(options, config={"model": "other"}),
    ):
        pass


@pytest.mark.parametrize("command", [["worker", "--model", "all-minilm-l6-v2"], ["serve", "all-minilm-l6-v2"]])
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1", "queue: expected a URL that begins with one of redis://"),
        ("redis://user:secret@127.0.0.1:1", "the queue at redis://127.0.0.1:1 cannot be reached"),
    ],
)
def test_a_wrong_url_is_said_at_once(workers: Workers, command: list[str], url: str, message: str) -> None:
    worker = workers.start(["-m", "pjengine", *command, "--queue", url])
    assert worker.process.wait(30) == 1
    assert message in worker.log
    assert "Traceback" not in worker.log
    assert "secret" not in worker.log
