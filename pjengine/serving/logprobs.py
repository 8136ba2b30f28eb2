"""Log-probabilities in the shapes of the API."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pjengine.request import TokenLogprobs
from pjengine.serving.protocol.chat import ChatLogprobs, TokenLogprob, TopLogprob
from pjengine.serving.protocol.completions import CompletionLogprobs, PromptLogprob, PromptLogprobs
from pjengine.tokenizer import Tokenizer


def token_string(tokenizer: Tokenizer, token_id: int) -> str:
    """The token alone, as text; part of a character is U+FFFD."""
    return tokenizer.decode([token_id], skip_special_tokens=False)


def chat_logprobs(tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """OpenAI's chat format."""

    def entry(token_id: int, logprob: float) -> TopLogprob:
        token = token_string(tokenizer, token_id)
        exact = tokenizer.token_bytes(token_id) if tokenizer.token_bytes else token.encode()
        return TopLogprob(token=token, logprob=logprob, bytes=list(exact))

    content = []
    for token_id, at in zip(token_ids, logprobs, strict=True):
        chosen = entry(token_id, at.token)
        top = [entry(other, logprob) for other, logprob in at.top]
        content.append(TokenLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top))
    return ChatLogprobs(content=content)


class CompletionLogprobsBuilder:
    """OpenAI's legacy format of one choice; offsets go on from call to call.

    Args:
      skip_special_tokens: special tokens are not in the text, so they take no room in it.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._offset = 0

    def add(self, token_ids: Sequence[int], logprobs: Iterable[TokenLogprobs | None]) -> CompletionLogprobs:
        """Of the next tokens; None stands for a prompt's first token, which nothing predicts."""
        found = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        for token_id, at in zip(token_ids, logprobs, strict=True):
            token = token_string(self._tokenizer, token_id)
            found.tokens.append(token)
            found.text_offset.append(self._offset)
            found.token_logprobs.append(None if at is None else at.token)
            found.top_logprobs.append(None if at is None else self._top(token, at))
            self._offset += len(self._tokenizer.decode([token_id], skip_special_tokens=self._skip_special_tokens))
        return found

    def _top(self, token: str, at: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, and the chosen one if it is not among them."""
        top: dict[str, float] = {}
        for other, logprob in at.top:  # of tokens that look the same the most likely one stays
            top.setdefault(token_string(self._tokenizer, other), logprob)
        top.setdefault(token, at.token)
        return top


def prompt_logprobs(
    tokenizer: Tokenizer | None, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]
) -> PromptLogprobs:
    """vLLM's format: at each position the most likely tokens and the one that stands there, by token id."""

    def entry(token_id: int, logprob: float, rank: int) -> PromptLogprob:
        text = token_string(tokenizer, token_id) if tokenizer else ""
        return PromptLogprob(logprob=logprob, rank=rank, decoded_token=text)

    found: PromptLogprobs = []
    for token_id, at in zip(token_ids, logprobs, strict=True):
        if at is None:
            found.append(None)
            continue
        top = {other: entry(other, logprob, rank) for rank, (other, logprob) in enumerate(at.top, 1)}
        found.append({**top, token_id: entry(token_id, at.token, at.rank)})
    return found
