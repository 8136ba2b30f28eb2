"""What every request must satisfy, whoever takes it in: the server, `LLM` or an engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, TypeGuard

import numpy as np

from pjengine.engine_info import EngineInfo
from pjengine.errors import InvalidRequest
from pjengine.request import Request
from pjengine.sampling_params import SamplingParams


def is_integer(value: Any) -> TypeGuard[int]:
    """Of Python or NumPy; True and False are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_unicode(text: str, field: str) -> None:
    """Raises InvalidRequest for a lone surrogate, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{field}: not valid Unicode: character {error.start} is the lone surrogate {text[error.start]!a}",
            field=field,
            code="invalid_unicode",
        ) from error


def check_prompt(token_ids: list[int], info: EngineInfo, *, field: str = "prompt") -> None:
    """Raises InvalidRequest unless the prompt has tokens, all in the vocabulary, and fits the model's window.

    Args:
      token_ids: the prompt's tokens.
      info: of the engine that shall run it.
      field: the request's field at fault, as the user spells it.
    """
    if not token_ids:
        raise InvalidRequest(f"{field}: empty; give at least one token", field=field, code="empty_prompt")
    # A generated token needs a place in the window too; an embedding has none.
    room = info.max_model_len - (info.kind == "generate")
    if len(token_ids) > room:
        raise InvalidRequest(
            f"{field}: {len(token_ids)} tokens, but the model's window of {info.max_model_len} has room for {room}; "
            "shorten it",
            field=field,
            code="context_length_exceeded",
        )
    check_token_ids(token_ids, info.vocab_size, field=field)  # last: it looks at each of them


def check_token_types(request: Request, info: EngineInfo) -> None:
    """Raises InvalidRequest unless the request has no token types, or one that the model knows for each token."""
    types = request.token_type_ids
    if types is None:
        return
    if not info.token_types:
        raise InvalidRequest(f"token_type_ids: {info.model} takes none; leave them out", field="token_type_ids")
    if len(types) != len(request.prompt_token_ids):
        raise InvalidRequest(
            f"token_type_ids: {len(types)} for {len(request.prompt_token_ids)} tokens; give one for each",
            field="token_type_ids",
        )
    if not all(0 <= kind < info.token_types for kind in types):
        raise InvalidRequest(
            f"token_type_ids: expected each in 0..{info.token_types - 1}, got {min(types)}..{max(types)}",
            field="token_type_ids",
        )


def check_token_ids(token_ids: Iterable[int], vocab_size: int, *, field: str) -> None:
    """Raises InvalidRequest unless every id is in [0, vocab_size)."""
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"{field}: token id {token} is outside the vocabulary, 0..{vocab_size - 1}",
                field=field,
                code="token_id_out_of_range",
            )


def check_max_tokens(
    params: SamplingParams, prompt_tokens: int, info: EngineInfo, *, field: str = "max_tokens"
) -> None:
    """Raises InvalidRequest where prompt and `max_tokens` together exceed the model's window."""
    if params.max_tokens is not None and prompt_tokens + params.max_tokens > info.max_model_len:
        raise InvalidRequest(
            f"{field}: {params.max_tokens} and a prompt of {prompt_tokens} tokens exceed the model's window of "
            f"{info.max_model_len}; ask for at most {info.max_model_len - prompt_tokens}",
            field=field,
            code="context_length_exceeded",
        )


def check_params(params: SamplingParams, info: EngineInfo) -> None:
    """Raises InvalidRequest where a parameter names a token outside the vocabulary."""
    listed: dict[str, Iterable[int]] = {
        "logit_bias": params.logit_bias or (),
        "allowed_token_ids": params.allowed_token_ids or (),
        "stop_token_ids": params.stop_token_ids,
        "bad_words": itertools.chain(*params.bad_words_token_ids),
    }
    for field, token_ids in listed.items():
        check_token_ids(token_ids, info.vocab_size, field=field)
