"""The sizes of a generating engine, from its options, the model's limit and the kind of device."""

from __future__ import annotations

import dataclasses

from pjengine.config import EngineConfig
from pjengine.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes that the engine and the plan agree on.

    Attributes:
      window: longest sequence, prompt and output, tokens.
      page_size: tokens of a KV page.
      max_num_seqs: sequences of a step.
      step_tokens: token budget of a step.
    """

    window: int
    page_size: int
    max_num_seqs: int
    step_tokens: int


def window_of(config: EngineConfig, model_limit: int) -> int:
    """Longest sequence in tokens. model_limit: the model's own. Raises: ConfigError if more is asked for."""
    if config.max_model_len is not None and config.max_model_len > model_limit:
        raise ConfigError(
            f"max_model_len: expected at most {model_limit}, the model's limit, got {config.max_model_len}"
        )
    return config.max_model_len or model_limit


def embedding_window(config: EngineConfig, model_limit: int, sentence_limit: int | None) -> int:
    """Longest text in tokens. sentence_limit: sentence-transformers' max_seq_length, kept unless more is asked for.

    Raises: ConfigError as window_of.
    """
    window = window_of(config, model_limit)
    return min(window, sentence_limit) if config.max_model_len is None and sentence_limit else window


def limits_of(config: EngineConfig, model_limit: int, *, gpu: bool) -> Limits:
    """The options, with the device's defaults where they are silent."""
    return Limits(
        window=window_of(config, model_limit),
        page_size=config.page_size or (64 if gpu else 16),
        max_num_seqs=config.max_num_seqs or (512 if gpu else 64),
        step_tokens=config.max_num_batched_tokens or (4096 if gpu else 512),
    )


def embedding_tokens(config: EngineConfig, window: int, *, gpu: bool) -> int:
    """Tokens of an embedding engine's largest batch: the longest text fits in any case."""
    return max(config.max_num_batched_tokens or (8192 if gpu else 512), window)
