"""A real redis-server, one for all tests of this folder; each test gets a queue of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from pjengine.queue.options import QueueOptions
from tests.queue.redis_server import RedisServer

_NAMES = itertools.count()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """One that the test may stop."""
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def options(redis_server: RedisServer) -> QueueOptions:
    return QueueOptions(url=redis_server.url, name=f"test-{next(_NAMES)}")
