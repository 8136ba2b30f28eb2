"""Three real workers with all-MiniLM-L6-v2 on one queue, one of them killed under load."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from pjengine import LLM
from pjengine.queue.options import QueueOptions
from pjengine.queue.scripts import keys_of
from tests.queue.redis_server import RedisServer
from tests.queue.workers import LiveWorker, Workers
from tests.serving.live_server import LiveServer, running, wait_for

pytestmark = pytest.mark.real

MODEL = "all-minilm-l6-v2"
TEXTS = [
    f"{number} {word}" for word in ("apples", "theories of everything", "ships at sea " * 6) for number in range(8)
]


@pytest.fixture
def started(options: QueueOptions) -> Iterator[tuple[list[LiveWorker], LiveServer]]:
    queue = ["--queue", options.url, "--queue-name", options.name]
    engine = ["--max-num-batched-tokens", "256", "--dtype", "float32"]
    with Workers() as workers:
        command = ["-m", "pjengine", "worker", "--model", MODEL, *queue, *engine, "--visibility", "1"]
        three = [workers.start(command) for _ in range(3)]
        with running(["-m", "pjengine", "serve", MODEL, "--port", "0", *queue], seconds=120) as server:
            for worker in three:
                worker.wait_ready(120)
            yield three, server


def test_every_request_is_answered_once_or_refused(
    started: tuple[list[LiveWorker], LiveServer], redis_server: RedisServer, options: QueueOptions
) -> None:
    (victim, *others), server = started
    claims = keys_of(options.name)[4]
    answers: dict[int, httpx.Response] = {}
    numbers = itertools.count()
    enough = threading.Event()

    def texts_of(number: int) -> list[int]:
        return [(number + i) % len(TEXTS) for i in range(8)]

    def load() -> None:
        while not enough.is_set():
            number = next(numbers)
            texts, kind = [TEXTS[i] for i in texts_of(number)], ("query", "document")[number % 2]
            answers[number] = server.post("/v1/embeddings", {"input": texts, "input_type": kind})

    def victim_works() -> bool:
        return any(claim.decode().startswith(victim.id) for claim in redis_server.client().zrange(claims, 0, -1))

    with ThreadPoolExecutor(24) as pool:
        loads = [pool.submit(load) for _ in range(24)]
        try:
            wait_for(lambda: len(answers) > 24)
            wait_for(victim_works)
            victim.process.kill()
            before = len(answers)
            wait_for(lambda: len(answers) > before + 72)
        finally:
            enough.set()
        for each in loads:
            each.result()

    assert sorted(answers) == list(range(next(numbers)))
    assert {answer.status_code for answer in answers.values()} == {200}
    with LLM(MODEL, dtype="float32", max_num_batched_tokens=256) as llm:
        expected = np.stack([result.embedding for result in llm.embed(TEXTS, use_tqdm=False)])
    for number, answer in answers.items():
        found = np.array([entry["embedding"] for entry in answer.json()["data"]])
        np.testing.assert_allclose(found, expected[texts_of(number)], rtol=0, atol=1e-5)

    time.sleep(1.1)  # the metrics are a second old
    metrics = server.metrics()
    items = 8 * len(answers)
    assert metrics["pjengine_queue_answered_total"] == metrics["pjengine_queue_submitted_total"] == items
    assert metrics["pjengine_queue_lapsed_claims_total"] >= 1
    assert metrics["pjengine_queue_redelivered_total"] >= 1
    assert metrics["pjengine_queue_workers"] == 2
    assert all(worker.process.poll() is None for worker in others)
    assert redis_server.client().hlen(keys_of(options.name)[0]) == 0
