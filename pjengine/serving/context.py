"""What the routes know of the server they belong to."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pjengine
from pjengine.config import EngineConfig
from pjengine.engine_info import EngineInfo
from pjengine.errors import InvalidRequest
from pjengine.models.sources import Source
from pjengine.pairs import PairEncoder
from pjengine.serving.engine_client import Client
from pjengine.serving.errors import ApiError
from pjengine.serving.metrics import NUM_COUNTERS, ServerMetrics
from pjengine.serving.middleware import Gate
from pjengine.serving.server_options import ServerOptions
from pjengine.serving.shared_counters import SharedCounters
from pjengine.serving.text_side import TextSide
from pjengine.tokenizer import Tokenizer

INLINE_CHARACTERS = 4096  # shorter texts are tokenized on the event loop: a thread would take longer


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids, and its text where text was given."""

    token_ids: list[int]
    text: str | None = None


@dataclasses.dataclass(frozen=True)
class ServerContext:
    """One served model.

    Attributes:
      client: its engine.
      tokenizer: None for a model without one; then only token ids are understood.
      model_names: names that requests may use; the first is the one we answer with.
      model_root: the model as given to `serve`.
      source: its files.
      pairs: how it reads pairs of texts; None for a model without a tokenizer, or of another kind than "classify".
      gate: shut while the server drains.
      max_body_bytes: longest body of a request.
      max_waiting: sequences that may wait, of one request too.
      created: unix seconds of the server's start.
    """

    client: Client
    tokenizer: Tokenizer | None
    model_names: tuple[str, ...]
    model_root: str
    source: Source
    pairs: PairEncoder | None
    metrics: ServerMetrics
    gate: Gate
    max_body_bytes: int
    max_waiting: int
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def info(self) -> EngineInfo:
        return self.client.info

    def require_model(self, name: str | None, *kinds: str, task: str | None = None) -> None:
        """Raises ApiError unless `name` is served, and is of a kind (EngineInfo.kind) that the endpoint needs.

        Args:
          kinds: that it needs; none: any will do.
          task: what it does with them, for the error; None: the kind says it.
        """
        if name is not None and name not in self.model_names:
            raise ApiError(
                404,
                f"model: {name!r} does not exist here; /v1/models lists what does",
                param="model",
                code="model_not_found",
            )
        if kinds and self.info.kind not in kinds:
            does = {"generate": "generates text", "embed": "embeds text", "classify": "classifies text"}
            raise ApiError(
                400,
                f"model: {self.model_names[0]} {does[self.info.kind]} and does not {task or kinds[0]}",
                param="model",
                code="wrong_model_kind",
            )

    def require_tokenizer(self, field: str) -> Tokenizer:
        """Raises InvalidRequest where the model has none."""
        if self.tokenizer is None:
            raise InvalidRequest(
                f"{field}: this model has no tokenizer; use endpoints and fields that take token ids", field=field
            )
        return self.tokenizer

    def require_pairs(self, field: str) -> PairEncoder:
        """Raises InvalidRequest where the model, of kind "classify", has no tokenizer."""
        self.require_tokenizer(field)
        assert self.pairs is not None
        return self.pairs

    async def encode(self, text: str, field: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; long ones are tokenized in a thread."""
        return (await self.encode_batch([text], [field], add_special_tokens))[0]

    async def encode_batch(
        self, texts: list[str], fields: list[str], add_special_tokens: bool, max_tokens: int | None = None
    ) -> list[list[int]]:
        """Token ids of each text, cut to `max_tokens`; many or long ones are tokenized in a thread.

        Args:
          fields: what the user calls each text, for errors.
        """
        tokenizer = self.require_tokenizer(fields[0])
        if sum(map(len, texts)) < INLINE_CHARACTERS:
            return tokenizer.encode_batch(texts, add_special_tokens, max_tokens, fields)
        return await asyncio.to_thread(tokenizer.encode_batch, texts, add_special_tokens, max_tokens, fields)

    async def encode_prompts(
        self, given: str | list[Any], field: str, add_special_tokens: bool, max_tokens: int | None = None
    ) -> list[EncodedPrompt]:
        """OpenAI's four forms of a prompt: a string, strings, token ids, lists of token ids; cut to `max_tokens`.

        Raises:
          InvalidRequest: there is no prompt in it.
        """
        prompts = list_prompts(given, field)
        if isinstance(prompts[0], list):
            return [EncodedPrompt(ids[:max_tokens]) for ids in prompts]
        encoded = await self.encode_batch(prompts, prompt_fields(field, given), add_special_tokens, max_tokens)
        return [EncodedPrompt(ids, text) for text, ids in zip(prompts, encoded, strict=True)]


def prompt_fields(field: str, given: str | Sequence[Any]) -> list[str]:
    """What the user calls each of the prompts in a field: `input[2]`, or `input` where it holds but one."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [field]
    return [f"{field}[{i}]" for i in range(len(given))]


def list_prompts(given: str | list[Any], field: str) -> list[Any]:
    """The prompts of a request as a list of strings or of lists of token ids; InvalidRequest where there is none."""
    if not given and not isinstance(given, str):  # a text without characters may still have special tokens
        raise InvalidRequest(f"{field}: is empty; give at least one prompt", field=field, code="empty_prompt")
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def make_context(
    client: Client, text: TextSide, config: EngineConfig, options: ServerOptions, counters: Path, row: int
) -> ServerContext:
    """Of one API process; `row`: of its counters in the file that all of them share."""
    names = options.served_model_names or (config.model,)
    shared = SharedCounters(counters, options.api_processes, row, NUM_COUNTERS)
    pairs = None
    if client.info.kind == "classify" and text.tokenizer is not None:
        pairs = PairEncoder(text.source, text.tokenizer, client.info)
    return ServerContext(
        client=client,
        tokenizer=text.tokenizer,
        model_names=names,
        model_root=config.model,
        source=text.source,
        pairs=pairs,
        metrics=ServerMetrics(lambda: client.stats, shared, names[0], pjengine.__version__, lambda: client.queue),
        gate=Gate(),
        max_body_bytes=options.max_body_bytes,
        max_waiting=config.max_waiting,
    )
