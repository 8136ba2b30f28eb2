"""What API processes and the engine's process say to each other: msgpack, one message per ZeroMQ frame."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from pjengine.engine_info import EngineInfo
from pjengine.errors import EngineOverloaded, InvalidRequest, PJEngineError
from pjengine.metrics import Stats
from pjengine.request import Output, Request

# -- API process to engine process -----------------------------------------------------------------------------------


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """The first message of every API process; answered by Ready as soon as the engine can serve."""


class Add(msgspec.Struct, tag="add", frozen=True):
    """The prompts of one HTTP request, under one id: the engine takes all or none, and answers Accepted or Refused."""

    submission: str
    requests: list[Request]


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """Ends a request, or one of its sequences; unknown ids are ignored."""

    request_id: str
    index: int | None = None


class Left(msgspec.Struct, tag="left", frozen=True):
    """An API process has ended: what it left running is aborted. Sent by the process that watches over the others.

    Attributes:
      client: the ZeroMQ identity it had.
    """

    client: bytes


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """The engine process shall end."""


# -- engine process to API process -----------------------------------------------------------------------------------


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The engine has started; the answer to Hello."""

    info: EngineInfo


class Accepted(msgspec.Struct, tag="accepted", frozen=True):
    submission: str


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """An InvalidRequest, or an EngineOverloaded (then `retry_after` is set)."""

    submission: str
    message: str
    field: str | None = None
    code: str | None = None
    retry_after: float | None = None

    @classmethod
    def of(cls, submission: str, error: InvalidRequest | EngineOverloaded) -> Refused:
        if isinstance(error, InvalidRequest):
            return cls(submission, str(error), field=error.field, code=error.code)
        return cls(submission, str(error), retry_after=error.retry_after)

    def error(self) -> PJEngineError:
        if self.retry_after is not None:
            return EngineOverloaded(self.message, retry_after=self.retry_after)
        return InvalidRequest(self.message, field=self.field, code=self.code)


class Outputs(msgspec.Struct, tag="outputs", frozen=True):
    """All that one step gave for the requests of one API process."""

    outputs: list[Output]


class StatsReport(msgspec.Struct, tag="stats", frozen=True):
    stats: Stats


class Fatal(msgspec.Struct, tag="fatal", frozen=True):
    """The engine cannot start or go on; the last message before its process ends.

    Attributes:
      message: the cause, for the user.
      expected: an error of the user's (a wrong model or option); otherwise a bug, whose traceback is in the log.
    """

    message: str
    expected: bool


ToEngine: TypeAlias = Hello | Add | Abort | Left | Stop
FromEngine: TypeAlias = Ready | Accepted | Refused | Outputs | StatsReport | Fatal
