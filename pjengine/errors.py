"""Every exception a user can meet. Each names the field at fault, the value found and the remedy."""

from __future__ import annotations


class PJEngineError(Exception):
    """Base of all errors raised on purpose; anything else that escapes is a bug."""


class ConfigError(PJEngineError, ValueError):
    """An engine option has a value that cannot work."""


class ModelError(PJEngineError, ValueError):
    """A model directory, file or name cannot be found, read or understood."""


class KernelUnavailable(PJEngineError, RuntimeError):
    """No backend (or not the one asked for) can serve an op here; the message lists each refusal."""


class OutOfMemory(PJEngineError, RuntimeError):
    """Weights, temporaries and the smallest useful KV cache do not fit; the message holds the numbers."""


class InvalidRequest(PJEngineError, ValueError):
    """One request is wrong; no other request is affected. HTTP status 400.

    Attributes:
      field: the request's field at fault, as the user spells it (OpenAI's `param`), or None.
      code: a machine-readable reason (OpenAI's `code`), or None.
    """

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None):
        super().__init__(message)
        self.field = field
        self.code = code


class EngineDead(PJEngineError, RuntimeError):
    """The engine stopped; open and new requests cannot be served.

    Attributes:
      code: a machine-readable reason (OpenAI's `code`).
    """

    code = "engine_dead"


class ShuttingDown(EngineDead):
    """It was told to stop, and the time that running requests have to finish is over."""

    code = "shutting_down"


class EngineOverloaded(PJEngineError, RuntimeError):
    """The waiting queue is full. HTTP status 503 with Retry-After.

    Attributes:
      retry_after: seconds after which a retry makes sense.
      code: a machine-readable reason (OpenAI's `code`).
    """

    code = "overloaded"

    def __init__(self, message: str, *, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


class QueueUnavailable(EngineOverloaded):
    """The queue that workers share cannot be reached, or nobody works on it. HTTP status 503 with Retry-After."""

    code = "queue_unavailable"


class DeadlineExceeded(PJEngineError, TimeoutError):
    """A request was not answered within its time, and is not computed any more. HTTP status 504."""
