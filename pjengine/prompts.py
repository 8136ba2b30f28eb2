"""From what a user gives to what an engine takes: checks and defaults that `LLM` and the server share."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import numpy as np

from pjengine.engine_info import EngineInfo
from pjengine.errors import InvalidRequest
from pjengine.request_checks import check_params, is_integer
from pjengine.sampling_params import SamplingParams

if TYPE_CHECKING:  # their modules take long to import, and a server's API process needs neither
    from pjengine.engine_info import EngineInfo
    from pjengine.models.sentence_files import SentenceFiles
    from pjengine.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int]
Message: TypeAlias = Mapping[str, Any]


def fit_window(params: SamplingParams, prompt_tokens: int, info: EngineInfo) -> SamplingParams:
    """The parameters with `max_tokens` cut to what the model's window leaves after the prompt."""
    room = info.max_model_len - prompt_tokens
    if params.max_tokens is None or params.max_tokens <= room:
        return params
    return msgspec.structs.replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))


def fit_tokens(truncate_prompt_tokens: int | None, info: EngineInfo) -> int | None:
    """The most tokens of an input, of what a user asks for: -1, the model's window; N, N; None, inputs are not cut.

    Raises:
      InvalidRequest: another value.
    """
    if truncate_prompt_tokens is None:
        return None
    window = info.max_model_len
    if is_integer(truncate_prompt_tokens):
        if truncate_prompt_tokens == -1:
            return window
        if 1 <= truncate_prompt_tokens <= window:
            return truncate_prompt_tokens
    raise InvalidRequest(
        f"truncate_prompt_tokens: expected -1, or 1 to the model's window of {window}, got {truncate_prompt_tokens!r}",
        field="truncate_prompt_tokens",
    )


def default_params(defaults: Mapping[str, Any], **given: Any) -> SamplingParams:
    """SamplingParams of the given fields; where None or missing, the model's own defaults, then SamplingParams'.

    Args:
      defaults: from the model's generation_config.json (`Source.default_sampling`).
      **given: what the user asked for.
    """
    return SamplingParams(**{**defaults, **{name: value for name, value in given.items() if value is not None}})


def engine_params(params: SamplingParams, info: EngineInfo, tokenizer: Tokenizer | None) -> SamplingParams:
    """The parameters as the engine takes them: ids checked, `bad_words` as token ids.

    Raises:
      InvalidRequest: a token id is outside the vocabulary, or strings are given for a model without a tokenizer.
    """
    check_params(params, info)
    if tokenizer is None:
        for field in ("stop", "bad_words"):
            if getattr(params, field):
                raise InvalidRequest(f"{field}: this model has no tokenizer; use token ids", field=field)
        return params
    if not params.bad_words:
        return params
    return msgspec.structs.replace(
        params, bad_words_token_ids=(*params.bad_words_token_ids, *bad_words_token_ids(params.bad_words, tokenizer))
    )


def bad_words_token_ids(words: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token sequences that spell each word, at the start of a text and after a space (as vLLM does).

    The form after a space counts only where the space changes the first token and not the number of tokens: otherwise
    it spells a lone space first, which is no form of the word.
    """
    found: list[tuple[int, ...]] = []
    for word in words:
        bare = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        if not bare:
            raise InvalidRequest(f"bad_words: {word!r} has no tokens", field="bad_words", code="invalid_value")
        found.append(bare)
        if spaced[0] != bare[0] and len(spaced) == len(bare):
            found.append(spaced)
    return tuple(dict.fromkeys(found))


def with_prompt(prompts: Sequence[str | list[int]], sentence: SentenceFiles, name: str | None) -> list[str | list[int]]:
    """Texts with one of the model's prompts before each, for embedding.

    Args:
      prompts: token ids among them stay as they are.
      sentence: of the model (`Source.sentence`).
      name: of a prompt in its config_sentence_transformers.json; "": none; None: its default, which most have not.
    Raises:
      InvalidRequest: there is no such prompt, or it is named for token ids.
    """
    if name is not None and not isinstance(name, str):
        raise InvalidRequest(f"prompt_name: expected a string, got {name!r}", field="prompt_name")
    if name and name not in sentence.prompts:
        known = f"known are {', '.join(sentence.prompts)}" if sentence.prompts else "it has none"
        raise InvalidRequest(f"prompt_name: the model has no prompt {name!r}; {known}", field="prompt_name")
    if name and not all(isinstance(prompt, str) for prompt in prompts):
        raise InvalidRequest("prompt_name: token ids take none; give texts, or leave it out", field="prompt_name")
    text = sentence.prompts.get((sentence.default_prompt if name is None else name) or "", "")
    return [text + prompt if isinstance(prompt, str) else prompt for prompt in prompts]


def as_prompts(given: Prompt | Sequence[Prompt]) -> list[str | list[int]]:
    """The prompts of a call: one prompt becomes a list of one, token ids become lists of int.

    Raises:
      InvalidRequest: anything that is neither a string nor token ids.
    """
    if isinstance(given, str):
        return [given]
    items = _as_list(given, "prompts")
    if items and all(is_integer(item) for item in items):
        return [[operator.index(item) for item in items]]
    return [item if isinstance(item, str) else _as_token_ids(item, f"prompts[{i}]") for i, item in enumerate(items)]


def _as_token_ids(given: object, field: str) -> list[int]:
    items = _as_list(given, field)
    for item in items:
        if not is_integer(item):
            raise InvalidRequest(f"{field}: expected a string or token ids, got {item!r} among them", field=field)
    return [operator.index(item) for item in items]


def _as_list(given: object, field: str) -> list[Any]:
    if isinstance(given, np.ndarray) and given.ndim:
        return list(given)
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise InvalidRequest(f"{field}: expected a string or token ids, or a list of them, got {given!r}", field=field)
    return list(given)


def as_conversations(given: Sequence[Message] | Sequence[Sequence[Message]]) -> list[list[Message]]:
    """One conversation becomes a list of one."""
    items = _as_list(given, "messages")
    conversations = [items] if items and isinstance(items[0], Mapping) else [_as_list(c, "messages") for c in items]
    for conversation in conversations:
        if not conversation or not all(isinstance(message, Mapping) for message in conversation):
            raise InvalidRequest(
                "messages: expected a conversation, a non-empty list of {'role': …, 'content': …}, or a list of those",
                field="messages",
            )
    return conversations


def as_params(given: Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    """The sampling parameters of `count` prompts; InvalidRequest unless there is one for each."""
    items = list(given) if isinstance(given, Sequence) else [given]
    for item in items:
        if not isinstance(item, SamplingParams):
            raise InvalidRequest(
                f"sampling_params: expected SamplingParams, or a list of them, got {item!r}", field="sampling_params"
            )
    if len(items) != count:
        raise InvalidRequest(
            f"sampling_params: {len(items)} of them for {count} prompts; give one for all, or one each",
            field="sampling_params",
        )
    return items
