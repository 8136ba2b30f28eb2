"""Options of a queue, the same for the server in front of it and for its workers."""

from __future__ import annotations

import dataclasses
import re

from pjengine.errors import ConfigError

SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueueOptions:
    """Where the queue is and how it deals with time and failure.

    Attributes:
      url: as redis-py reads it: redis://[user:password@]host:port/db, rediss:// (TLS; `?ssl_ca_certs=…`), unix://; with
        +cluster for a Redis Cluster.
      name: queues of different names share a Redis without meeting.
      visibility: seconds after which the claims of a worker that says nothing more go to another.
      timeout: seconds after which a request is answered with a timeout.
      max_deliveries: workers that an item may be given to; when the last one dies of it too, it is refused.
    """

    url: str
    name: str = "default"
    visibility: float = 10.0
    timeout: float = 60.0
    max_deliveries: int = 3

    def __post_init__(self) -> None:
        scheme = self.url.partition("://")[0]
        if scheme not in SCHEMES:
            raise ConfigError(f"queue: expected a URL that begins with one of {'://, '.join(SCHEMES)}://")
        if not re.fullmatch(r"[\w.:-]{1,100}", self.name):
            raise ConfigError(f"queue_name: expected 1 to 100 of letters, digits and _ . : -, got {self.name!r}")
        for field, value in (("visibility", self.visibility), ("queue_timeout", self.timeout)):
            if not 0.1 <= value <= 86400:
                raise ConfigError(f"{field}: expected 0.1 to 86400 seconds, got {value!r}")
        if self.max_deliveries < 1:
            raise ConfigError(f"max_deliveries: expected at least 1, got {self.max_deliveries!r}")

    @property
    def address(self) -> str:
        """For messages: the URL without user, password and query."""
        scheme, separator, rest = self.url.partition("://")
        return scheme + separator + rest.rpartition("@")[2].partition("?")[0]
