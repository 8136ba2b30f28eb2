"""What `LLM` returns: frozen results with text, one per prompt and in the order of the prompts."""

from __future__ import annotations

import dataclasses

import numpy as np

from pjengine.request import Timings, TokenLogprobs


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One of the `n` sequences generated from a prompt.

    Attributes:
      index: which of them, 0..n - 1.
      text: the generated text; "" for a model without a tokenizer.
      token_ids: generated tokens, with the end-of-sequence or stop token that ended them.
      finish_reason: "stop", "length" or "error".
      stop_reason: the stop string or stop token id that ended it; None for end-of-sequence and length.
      logprobs: one per generated token, where `SamplingParams.logprobs` asks for them.
      error: what went wrong where `finish_reason` is "error".
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """All that was generated from one prompt.

    Attributes:
      prompt: its text; None where token ids were given.
      prompt_token_ids: its tokens.
      outputs: `SamplingParams.n` of them, by index.
      prompt_logprobs: None for the first prompt token, one per later token, where asked for.
      timings: seconds since the prompt was handed to the engine: the first sequence's first token, the last one's end.
      cached_tokens: prompt tokens whose KV pages were found in the prefix cache.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None
    timings: Timings | None
    cached_tokens: int


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddingOutput:
    """The embedding of one prompt: float32 [embedding_size], and the tokens it was made of."""

    embedding: np.ndarray
    prompt_token_ids: list[int]


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationOutput:
    """The class of one prompt: the most likely label, float32 [labels] of all, and the tokens it was made of."""

    label: str
    probs: np.ndarray
    prompt_token_ids: list[int]


@dataclasses.dataclass(frozen=True)
class RankedDocument:
    """A document, its place among those that were given, and its score."""

    index: int
    relevance_score: float
    document: str
