"""A worker's side of the queue: claims batches and answers them. Synchronous, and safe to use from two threads."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import msgspec

from pjengine.engine_info import EngineInfo
from pjengine.errors import ConfigError
from pjengine.queue.options import QueueOptions
from pjengine.queue.scripts import WAIT_SECONDS, connect, keys_of, redis_errors, redis_module, script, unavailable


@dataclasses.dataclass(frozen=True)
class Claim:
    """A batch that this worker holds.

    Attributes:
      id: names it in the queue.
      payloads: item to request (msgpack of `Request`), in the order in which they are to be computed.
      alone: an item that others died of; nothing is to be computed beside it.
    """

    id: str
    payloads: dict[str, bytes]
    alone: bool


def fingerprint(info: EngineInfo) -> str:
    """Equal for workers whose answers are interchangeable: the model by name and revision, not by where it lies."""
    same = dataclasses.replace(info, model=PurePath(info.model).name, dtype="", device="", page_size=0, backends=())
    return hashlib.sha256(msgspec.msgpack.encode(same)).hexdigest()[:16]


class WorkerLink:
    """One worker's connection.

    Every method raises QueueUnavailable where Redis is lost or refuses; none is repeated by itself.

    Attributes:
      worker: this worker's id.
    """

    def __init__(self, options: QueueOptions):
        self.worker = uuid.uuid4().hex[:16]
        self._options = options
        self._redis = connect(options, asynchronous=False)
        self._errors = redis_errors()
        self._no_script = redis_module().exceptions.NoScriptError
        self._keys = keys_of(options.name)
        self._claims = itertools.count()

    def ping(self) -> None:
        with self._reported():
            self._redis.ping()

    def beat(self, info: EngineInfo, claims: Sequence[str] = ()) -> set[str]:
        """Joins the queue, or stays in it; to be called more often than once in `visibility`.

        Args:
          info: of this worker's engine.
          claims: those it works on; they are extended.
        Returns: those of them that have lapsed.
        Raises:
          ConfigError: other workers of this queue serve another model.
        """
        visibility = _ms(self._options.visibility)
        model = fingerprint(info), msgspec.msgpack.encode(info)
        reply = self._run("worker_beat", self.worker, visibility, *model, *claims)
        if reply[0] == b"other":
            other = msgspec.msgpack.decode(reply[1], type=EngineInfo)
            differ = [
                f"{field.name} {getattr(other, field.name)!r} (here {getattr(info, field.name)!r})"
                for field in dataclasses.fields(EngineInfo)
                if field.name not in ("dtype", "device", "page_size", "backends")
                and getattr(other, field.name) != getattr(info, field.name)
            ]
            raise ConfigError(
                f"queue_name: workers of the queue {self._options.name!r} serve {', '.join(differ)}; "
                "give this model a queue of its own"
            )
        return {claim.decode() for claim in reply[1:]}

    def wait(self) -> None:
        """Returns when there may be work, or after a second."""
        with self._reported():
            self._redis.blpop([self._keys[11]], timeout=WAIT_SECONDS)

    def claim(self, budget: int, max_items: int, document_budget: int, in_hand: int = 0) -> Claim | None:
        """Claims a batch; None if there is none.

        Args:
          budget: most tokens of it (one item is claimed in any case).
          max_items: most items of it.
          document_budget: most tokens of documents in it.
          in_hand: claims this worker has not completed yet.
        """
        name = f"{self.worker}:{next(self._claims)}"
        visibility = _ms(self._options.visibility)
        alone, *reply = self._run("claim", name, budget, max_items, document_budget, visibility, in_hand)
        if not reply:
            return None
        payloads = {item.decode(): payload for item, payload in zip(reply[::2], reply[1::2], strict=True)}
        return Claim(name, payloads, bool(alone))

    def complete(self, claim: str, answers: Mapping[str, bytes]) -> int:
        """Ends a claim with an answer (msgpack of `Output`) per item; returns how many were published.

        The others were not this claim's any more. To be repeated after QueueUnavailable: it publishes none twice.
        """
        return int(self._run("complete", claim, *itertools.chain.from_iterable(answers.items())))

    def give_back(self, claims: Sequence[str], *, tried: bool) -> None:
        """Ends claims without answers; others get the items. tried: it counts as a delivery that failed."""
        self._run("give_back", int(tried), *claims)

    def leave(self) -> None:
        """Says that this worker takes no more."""
        self._run("worker_leave", self.worker)

    def close(self) -> None:
        self._redis.close()

    def _run(self, name: str, *arguments: Any) -> Any:
        text, digest = script(name)
        with self._reported():
            try:
                return self._redis.evalsha(digest, len(self._keys), *self._keys, *arguments)
            except self._no_script:
                return self._redis.eval(text, len(self._keys), *self._keys, *arguments)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise unavailable(self._options, error) from error


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
