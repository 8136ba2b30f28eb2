"""Options of the HTTP server."""

from __future__ import annotations

import dataclasses

from pjengine.errors import ConfigError

LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of the HTTP server.

    Attributes:
      host, port: where to listen; port 0 takes a free one.
      served_model_names: what requests may call the model; empty: the model as given.
      api_key: asked of every request but /health and /metrics; None: none is.
      api_processes: that speak HTTP and tokenize, on one port; the kernel deals out connections.
      max_body_bytes: longest body of a request.
      shutdown_grace: seconds that running requests have to finish after SIGTERM or Ctrl-C.
      log_level: one of LOG_LEVELS.
      access_log: log a line for each request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    api_key: str | None = None
    api_processes: int = 1
    max_body_bytes: int = 32 << 20
    shutdown_grace: float = 30.0
    log_level: str = "info"
    access_log: bool = False

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, "port", self.port, "0 to 65535")
        key = self.api_key
        if key is not None and (not key.isprintable() or key.strip() != key or not key):  # no header could bring it
            raise ConfigError(
                "api_key: expected a key of printable characters, not empty, without spaces or a newline at its ends"
            )
        _require(1 <= self.api_processes <= 256, "api_processes", self.api_processes, "1 to 256")
        _require(self.max_body_bytes > 0, "max_body_bytes", self.max_body_bytes, "above 0")
        _require(0 <= self.shutdown_grace <= 86400, "shutdown_grace", self.shutdown_grace, "0 to 86400 seconds")
        _require(self.log_level in LOG_LEVELS, "log_level", self.log_level, f"one of {', '.join(LOG_LEVELS)}")


def _require(ok: bool, field: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{field}: expected {allowed}, got {value!r}")
