"""How one request wants its tokens chosen; names and meanings are OpenAI's and vLLM's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from pjengine.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_N = 128
MAX_BAD_WORD_TOKENS = 16
_GREEDY_BELOW = 1e-5  # vLLM's; logits divided by less overflow


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Sampling parameters of one request; also the wire format between processes. Unknown names raise TypeError.

    Attributes:
      max_tokens: most tokens to generate; None: up to the model's window.
      min_tokens: no end-of-sequence or stop token before this many.
      temperature: logits are divided by it; below 1e-5 (0, as a rule) the most likely token is taken.
      top_p: keep the smallest set of most probable tokens whose share of what top_k keeps is at least this. (0, 1].
      top_k: keep the k most probable tokens, the lower ids among equals; 0 or -1 keeps all.
      min_p: drop tokens less probable than this share of the most probable one's. [0, 1].
      seed: the random stream is a pure function of (seed, position); None draws one per request.
      n: sequences to generate from the prompt, sharing its pages.
      stop: strings that end the text, also across token borders.
      stop_token_ids: tokens that end the sequence, besides the model's end-of-sequence tokens.
      ignore_eos: do not stop at the model's end-of-sequence tokens.
      presence_penalty, frequency_penalty: subtracted from logits of generated tokens. [-2, 2].
      repetition_penalty: divides positive (multiplies negative) logits of tokens in prompt or output. (0, 2].
      logit_bias: token id -> value added to its logit. Values in [-100, 100].
      allowed_token_ids: only these may be generated; None allows all.
      bad_words: strings whose token sequences must not appear in the output.
      bad_words_token_ids: `bad_words` as token ids, filled in where the tokenizer is (the engine knows only ids).
      logprobs: log-probabilities of the chosen and this many most likely tokens, 0..20; None: none.
      prompt_logprobs: the same for each prompt token after the first.
      include_stop_str_in_output: keep the stop string at the end of the text.
      skip_special_tokens: leave special tokens out of the text.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            value = getattr(self, name) or ()
            value = (value,) if isinstance(value, str) else _tuple(name, value, "strings")
            _require(all(isinstance(s, str) and s for s in value), name, value, "non-empty strings")
            msgspec.structs.force_setattr(self, name, value)
        for name in ("stop_token_ids", "allowed_token_ids"):
            value = getattr(self, name)
            if value is not None:
                value = _tuple(name, value, "token ids")
                _require(all(_is_int(t) and t >= 0 for t in value), name, value, "token ids of at least 0")
                msgspec.structs.force_setattr(self, name, value)
        words = _tuple("bad_words_token_ids", self.bad_words_token_ids, "lists of token ids")
        words = tuple(_tuple("bad_words_token_ids", word, "lists of token ids") for word in words)
        msgspec.structs.force_setattr(self, "bad_words_token_ids", words)
        _integer(self, "max_tokens", 1, None, optional=True)
        _integer(self, "min_tokens", 0, self.max_tokens)
        _integer(self, "top_k", -1, None)
        _integer(self, "n", 1, MAX_N)
        _integer(self, "seed", -(2**63), 2**64 - 1, optional=True)
        _integer(self, "logprobs", 0, MAX_LOGPROBS, optional=True)
        _integer(self, "prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        _number(self, "temperature", 0.0, 2.0**16)
        _number(self, "top_p", 0.0, 1.0, low_open=True)
        _number(self, "min_p", 0.0, 1.0)
        _number(self, "presence_penalty", -2.0, 2.0)
        _number(self, "frequency_penalty", -2.0, 2.0)
        _number(self, "repetition_penalty", 0.0, 2.0, low_open=True)
        _require(self.allowed_token_ids != (), "allowed_token_ids", [], "at least one token id, or null")
        biases = self.logit_bias or {}
        _require(isinstance(biases, Mapping), "logit_bias", biases, "token ids with their biases")
        for token, bias in biases.items():
            _require(_is_int(token) and token >= 0, "logit_bias", token, "token ids of at least 0 as keys")
            _require(_is_number(bias) and -100 <= bias <= 100, "logit_bias", bias, "values from -100 to 100")
        for word in self.bad_words_token_ids:
            _require(
                0 < len(word) <= MAX_BAD_WORD_TOKENS,
                "bad_words",
                word,
                f"words of at most {MAX_BAD_WORD_TOKENS} tokens",
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < _GREEDY_BELOW or self.top_k == 1


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(ok: bool, field: str, value: object, allowed: str) -> None:
    if not ok:
        raise InvalidRequest(f"{field}: expected {allowed}, got {value!r}", field=field, code="invalid_value")


def _tuple(field: str, value: Any, of: str) -> tuple[Any, ...]:
    _require(isinstance(value, Iterable) and not isinstance(value, (str, bytes)), field, value, f"a list of {of}")
    return tuple(value)


def _integer(params: SamplingParams, name: str, low: int, high: int | None, optional: bool = False) -> None:
    value = getattr(params, name)
    if optional and value is None:
        return
    bounds = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    ok = _is_int(value) and value >= low and (high is None or value <= high)
    _require(ok, name, value, bounds)


def _number(params: SamplingParams, name: str, low: float, high: float, low_open: bool = False) -> None:
    value = getattr(params, name)
    ok = _is_number(value) and low <= value <= high and not (low_open and value == low)
    _require(
        ok, name, value, f"a number {'above' if low_open else 'from'} {low:g} {'up ' if low_open else ''}to {high:g}"
    )
