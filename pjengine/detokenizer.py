"""Detokenizer: text of a growing token sequence, piece by piece, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pjengine.sampling_params import SamplingParams
    from pjengine.tokenizer import Tokenizer

_CONTEXT = 8  # tokens kept to the left: what a token's text may depend on, and more than the bytes of a character
_WINDOW = 32  # tokens decoded again with each push, at most (but for sequences of tokens without any text)
_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Turns one sequence's tokens into text as they come. Work per token does not grow with the sequence.

    The pieces put together are the text of all tokens, cut at the stop string that is complete first; of several
    complete at one character, the longest. A character is given out once all its bytes are there, and text that may
    begin a stop string once it cannot.

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
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window = self._visible(prompt_ids[-2 * _CONTEXT :])[-_CONTEXT:]
        self._given = len(_complete(self._decode(self._window)))
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
        text = ""
        if self._unsearched_tokens and token_ids:
            count = min(self._unsearched_tokens, len(token_ids))
            text, token_ids = self._detokenize(token_ids[:count], finished=False), token_ids[count:]
            self._unsearched_tokens -= count
        return text + self._up_to_stop(self._detokenize(token_ids, finished), finished), self._stopped

    def _detokenize(self, token_ids: Sequence[int], finished: bool) -> str:
        self._window += self._visible(token_ids)
        text = self._decode(self._window)
        end = len(text if finished else _complete(text))
        new = text[self._given : end]
        self._given = max(self._given, end)
        if len(self._window) > _WINDOW:
            self._shorten(text)
        return new

    def _shorten(self, text: str) -> None:
        """Forgets tokens whose text was given out, unless the rest would read differently without them."""
        # A character has 4 tokens at most: one of these tails begins with a character.
        for size in range(_CONTEXT, _CONTEXT + 4):
            tail = self._decode(self._window[-size:])
            if tail and text.endswith(tail) and len(text) - len(tail) <= self._given:
                self._window = self._window[-size:]
                self._given -= len(text) - len(tail)
                return

    def _up_to_stop(self, text: str, finished: bool) -> str:
        start = len(self._held)
        self._held += text
        for end, character in enumerate(text, start + 1):
            complete = [stop for stop in self._stops if stop.advance(character)]
            if complete:
                self._stopped = max((stop.text for stop in complete), key=len)
                return self._held[: end if self._keep_stop else end - len(self._stopped)]
        held = 0 if finished else max((stop.matched for stop in self._stops), default=0)
        given = len(self._held) - held
        text, self._held = self._held[:given], self._held[given:]
        return text

    def _visible(self, token_ids: Sequence[int]) -> list[int]:
        return [token for token in token_ids if token not in self._skipped]

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


def _complete(text: str) -> str:
    """Without the character at the end whose bytes may not all be there yet."""
    return text[:-1] if text.endswith(_INCOMPLETE) else text
