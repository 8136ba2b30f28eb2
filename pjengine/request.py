"""What goes into an engine and what comes out: token ids only. These structs are also the wire format between
processes.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pjengine.sampling_params import SamplingParams


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt to continue (`params` set), or to embed or classify (`params` None), as the engine's kind is.

    Attributes:
      request_id: unique among the open requests of an engine.
      prompt_token_ids: at least one id, each below the model's vocabulary size.
      params: how to sample; None for engines that do not generate.
      token_type_ids: the segment of each token, 0 for a pair's first text and 1 for its second; None: all 0.
      input_type: of an embedding request: documents let queries go first.
      priority: lower runs first; equal priorities run first come, first served.
      cache_salt: prefix-cache pages are shared only between requests with the same salt.
      arrival_time: `time.monotonic()` seconds at which the user's request came in; None: when the engine got it.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams | None = None
    token_type_ids: list[int] | None = None
    input_type: Literal["query", "document"] = "query"
    priority: int = 0
    cache_salt: str | None = None
    arrival_time: float | None = None


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities (natural log, of the model's unmodified distribution) at one position.

    Attributes:
      token: log-probability of the token that stands there.
      rank: that token's rank, 1 is the most likely.
      top: the k most likely tokens, most likely first, as (token id, log-probability).
    """

    token: float
    rank: int
    top: list[tuple[int, float]]


class Timings(msgspec.Struct, frozen=True):
    """Seconds since the request arrived (`time.monotonic` differences)."""

    queued: float  # until first scheduled
    first_token: float  # until the first output token was known
    finished: float  # until the last output token was known


class Output(msgspec.Struct, kw_only=True):
    """What one step adds to one sequence of a request.

    Attributes:
      request_id: of the request.
      index: which of its `n` sequences.
      token_ids: new tokens, in order; a stop token that ended the sequence is the last one.
      logprobs: one per new token, if asked for.
      prompt_logprobs: sent once, with the first output of sequence 0: None for the first prompt token, one per later
        token.
      embedding: float32 vector as raw little-endian bytes, of an engine that embeds.
      logits: float32, one per label, as raw little-endian bytes, of an engine that classifies.
      finish_reason: None while running; "stop" (eos or stop token), "length", "abort" or "error".
      stop_reason: the stop token id that ended it, if it is one of `stop_token_ids`.
      error: a message for the user where `finish_reason` is "error".
      cached_tokens: prompt tokens found in the prefix cache.
      timings: with the first output of a sequence (`finished`: so far), for one that its user ends, and with the last.
    """

    request_id: str
    index: int = 0
    token_ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    embedding: bytes | None = None
    logits: bytes | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: str | None = None
    cached_tokens: int = 0
    timings: Timings | None = None
