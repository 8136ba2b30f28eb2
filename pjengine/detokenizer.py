"""Detokenizer: text of a growing token sequence, piece by piece, up to the first stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pjengine.sampling_params import SamplingParams
    from pjengine.tokenizer import Tokenizer

_PROMPT_CONTEXT = 8  # prompt tokens that the first text may depend on: more than a character has bytes
_UNREADABLE = "\ufffd"  # what bytes that are no character, or not yet, are decoded to
_LONGEST_CHARACTER = 16  # tokens; more that end in no character will not become one


class Detokenizer:
    """Turns one sequence's tokens into text as they come. Work per token does not grow with the sequence.

    The pieces put together are the text of all tokens, cut at the stop string that is complete first; of several
    complete at one character, the longest. A character is given out once all its bytes are there, and text that may
    begin a stop string once it cannot. How tokens are divided among calls makes no difference.

    Args:
      tokenizer: of the model.
      prompt_ids: the prompt: the first token's text may depend on what stands before it (a leading space).
      skip_special_tokens: leave special tokens out.
      stop: strings that end the text.
      include_stop_str_in_output: keep the stop string.
      min_tokens: the text of this many first tokens is not searched for stop strings.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ):
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._characters = _characters(tokenizer, self._visible(prompt_ids[-2 * _PROMPT_CONTEXT :])[-_PROMPT_CONTEXT:])
        self._stops = [_StopString(s) for s in stop]
        self._keep_stop = include_stop_str_in_output
        self._unsearched_tokens = min_tokens
        self._held = ""  # text that may be the beginning of a stop string
        self._stopped: str | None = None

    @classmethod
    def make(cls, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams) -> Detokenizer:
        """The detokenizer that a request's sampling parameters ask for."""
        return cls(
            tokenizer,
            prompt_ids,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop,
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def push(self, token_ids: Sequence[int], finished: bool = False) -> tuple[str, str | None]:
        """Takes the next tokens; returns (new text, the stop string that ended the text or None).

        Args:
          finished: no more tokens come: give out all that was held back. A text that has stopped stays as it is.
        """
        if self._stopped is not None:
            return "", self._stopped
        count = min(self._unsearched_tokens, len(token_ids))
        self._unsearched_tokens -= count
        unsearched = self._characters.push(self._visible(token_ids[:count]))
        searched = self._characters.push(self._visible(token_ids[count:]))
        if finished:
            searched += self._characters.finish()
        return unsearched + self._up_to_stop(searched, finished), self._stopped

    def _up_to_stop(self, text: str, finished: bool) -> str:
        start = len(self._held)
        self._held += text
        for end, character in enumerate(text if self._stops else "", start + 1):
            complete = [stop for stop in self._stops if stop.advance(character)]
            if complete:
                self._stopped = max((stop.text for stop in complete), key=len)
                return self._held[: end if self._keep_stop else end - len(self._stopped)]
        held = 0 if finished else max((stop.matched for stop in self._stops), default=0)
        given = len(self._held) - held
        text, self._held = self._held[:given], self._held[given:]
        return text

    def _visible(self, token_ids: Iterable[int]) -> list[int]:
        return [token for token in token_ids if token not in self._skipped]


class _Characters(Protocol):
    """Whole characters out of tokens."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The characters that these tokens complete."""

    def finish(self) -> str:
        """What is left: U+FFFD for bytes that became no character."""


def _characters(tokenizer: Tokenizer, prompt_ids: list[int]) -> _Characters:
    if tokenizer.token_bytes is not None:
        return _FromBytes(tokenizer.token_bytes, prompt_ids)
    return _FromContext(tokenizer, prompt_ids)


class _FromBytes:
    """For byte-level vocabularies: a token is the same bytes wherever it stands."""

    def __init__(self, token_bytes: Callable[[int], bytes], prompt_ids: Sequence[int]):
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.push(prompt_ids)  # it may end within a character

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(map(self._token_bytes, token_ids)))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _FromContext:
    """For all others: a token's text is what it adds to the text of those before it.

    Decoding starts anew wherever a character ended, as in text-generation-inference, so that bytes that spell no
    character no character cannot spoil those before them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]):
        self._tokenizer = tokenizer
        self._context = prompt_ids
        self._context_text = self._decode(prompt_ids)
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(self._push(token) for token in token_ids)

    def finish(self) -> str:
        return self._decode(self._context + self._pending)[len(self._context_text) :] if self._pending else ""

    def _push(self, token: int) -> str:
        self._pending.append(token)
        text = self._decode(self._context + self._pending)
        if text.endswith(_UNREADABLE) and len(self._pending) < _LONGEST_CHARACTER:
            return ""
        new = text[len(self._context_text) :]
        # A token without text of its own may yet change what the next one adds.
        self._context = self._pending if new else (self._context + self._pending)[-_LONGEST_CHARACTER:]
        self._context_text = self._decode(self._context)
        self._pending = []
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class _StopString:
    """Finds one string in characters that come one by one (Knuth, Morris, Pratt 1977).

    Attributes:
      matched: how many of its first characters the text ends with.
    """

    def __init__(self, text: str):
        self.text = text
        self.matched = 0
        self._shorter = [0] * len(text)  # length of the longest proper prefix that text[: i + 1] ends with
        for i in range(1, len(text)):
            self._shorter[i] = self._next(self._shorter[i - 1], text[i])

    def advance(self, character: str) -> bool:
        """Takes the next character; True when the string is complete."""
        self.matched = self._next(self.matched, character)
        return self.matched == len(self.text)

    def _next(self, matched: int, character: str) -> int:
        while matched and (matched == len(self.text) or self.text[matched] != character):
            matched = self._shorter[matched - 1]
        return matched + (self.text[matched] == character)
