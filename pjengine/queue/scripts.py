"""The Lua scripts, the keys they work on, and connections to run them on."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

from pjengine.errors import ConfigError, QueueUnavailable
from pjengine.queue.options import QueueOptions

CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 5.0  # longer than the longest blocking call
WAIT_SECONDS = 1  # the longest blocking call
_KEYS = (
    "items",
    "payloads",
    "waiting:query",
    "waiting:document",
    "claims",
    "claim_items",
    "deadlines",
    "clients",
    "workers",
    "model",
    "counters",
    "wake",
    "results:",
)


@functools.cache
def script(name: str) -> tuple[str, str]:
    """A script's text, and the digest under which Redis keeps it."""
    folder = Path(__file__).parent
    text = (folder / "common.lua").read_text("utf-8") + (folder / f"{name}.lua").read_text("utf-8")
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def keys_of(name: str) -> list[str]:
    """KEYS of every script, in the order of common.lua. The braces make a cluster keep them together."""
    return [f"{{pjengine:{name}}}:{key}" for key in _KEYS]


def redis_module() -> ModuleType:
    """redis-py. Raises: ConfigError if it is not installed."""
    try:
        import redis
        import redis.asyncio
    except ImportError:
        raise ConfigError("queue: needs the package redis; pip install 'pjengine[queue]'") from None
    return redis


def redis_errors() -> tuple[type[Exception], ...]:
    """What redis-py raises where Redis cannot be reached or refuses. A cluster's own errors are no RedisErrors."""
    redis = redis_module()
    return redis.RedisError, redis.exceptions.RedisClusterException, OSError


def connect(options: QueueOptions, *, asynchronous: bool) -> Any:
    """A client of redis-py; nothing is sent yet. A call that fails is not repeated by itself.

    Raises:
      ConfigError: the URL cannot be understood.
    """
    redis = redis_module()
    package = redis.asyncio if asynchronous else redis
    arguments: dict[str, Any] = {"socket_connect_timeout": CONNECT_SECONDS, "socket_timeout": ANSWER_SECONDS}
    scheme, separator, rest = options.url.partition("://")
    if scheme.endswith("+cluster"):
        make = package.RedisCluster.from_url
    else:
        make = package.Redis.from_url
        arguments["retry"] = _no_retry(asynchronous)
    try:
        client = make(scheme.removesuffix("+cluster") + separator + rest, **arguments)
        if not scheme.endswith("+cluster"):
            client.connection_pool.make_connection()  # not to Redis yet: it takes the URL's options, or raises
        return client
    except redis_errors() as error:  # a cluster is asked for its nodes at once
        raise unavailable(options, error) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"queue: {options.address} cannot be used: {error}") from error


def unavailable(options: QueueOptions, error: Exception) -> QueueUnavailable:
    """What to raise for an error of redis-py."""
    return QueueUnavailable(f"the queue at {options.address} cannot be reached or used: {error}")


def _no_retry(asynchronous: bool) -> Any:
    from redis.asyncio.retry import Retry as AsyncRetry
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    return (AsyncRetry if asynchronous else Retry)(NoBackoff(), 0)
