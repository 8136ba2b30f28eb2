"""Pairs of texts as a cross-encoder reads them: one sequence of tokens for each document of a query."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pjengine.engine_info import EngineInfo
from pjengine.errors import InvalidRequest
from pjengine.models.sources import Source
from pjengine.request_checks import check_unicode

if TYPE_CHECKING:
    from pjengine.tokenizer import Tokenizer

# Qwen3-Reranker's own (arXiv:2506.05176 and its model card), which its tokenizer's chat template may not know.
_QWEN3 = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
_QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_QUERY, _DOCUMENT = "\ue000query\ue000", "\ue000document\ue000"  # of a private use area: in no template


@dataclasses.dataclass(frozen=True)
class PairTokens:
    """A query and a document as one sequence. token_type_ids: None where the engine takes none."""

    token_ids: list[int]
    token_type_ids: list[int] | None = None


class PairEncoder:
    """Puts pairs together as the model was trained on them. Thread-safe.

    A model whose chat template has the roles `query` and `document` (as sentence-transformers' rerankers have) gets
    that template, Qwen3-Reranker its own, any other model what its tokenizer does of a pair: [CLS] query [SEP] document
    [SEP], with segments where it has them.

    Args:
      source: the model's files.
      tokenizer: of the model.
      info: of the engine.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, info: EngineInfo):
        self._tokenizer = tokenizer
        self._info = info
        self._own_template = _has_pair_template(tokenizer)
        self._qwen3 = not self._own_template and source.model_type == "qwen3"
        self._instruction = source.sentence.prompts.get(source.sentence.default_prompt or "")

    def encode(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        max_tokens: int | None = None,
        field: str = "query",
    ) -> list[PairTokens]:
        """One sequence for each document, in order; the query is tokenised once.

        Args:
          field: what the user calls the query, for errors.
          instruction: what to judge by, for models with a template; None: the model's default.
          max_tokens: longer sequences lose the end of their document; None: they stay as they are.
        Raises:
          InvalidRequest: a text is no valid Unicode, the query alone exceeds `max_tokens`, or the model takes no
            instruction.
        """
        if instruction is not None and not isinstance(instruction, str):
            raise InvalidRequest(f"instruction: expected a string, got {instruction!r}", field="instruction")
        if self._own_template or self._qwen3:
            return self._from_template(query, documents, instruction, max_tokens, field)
        if instruction is not None:
            raise self._reads_no_instruction()
        pairs = self._tokenizer.encode_pairs(query, documents, max_tokens, field)
        return [PairTokens(ids, types if self._info.token_types else None) for ids, types in pairs]

    def _from_template(
        self, query: str, documents: Sequence[str], instruction: str | None, max_tokens: int | None, field: str
    ) -> list[PairTokens]:
        check_unicode(instruction or "", "instruction")
        before, after = self._render(query, instruction or self._instruction)
        if instruction and self._render(query, None) == (before, after):  # its template leaves the instruction out
            raise self._reads_no_instruction()
        space = before[len(before.rstrip(" ")) :]  # a document's first word is one token with the space before it
        head, tail = self._tokenizer.encode_batch([before.rstrip(" "), after], add_special_tokens=False)
        bodies = self._tokenizer.encode_batch([space + text for text in documents], add_special_tokens=False)
        if max_tokens is not None:
            room = max_tokens - len(head) - len(tail)
            if room < 1:
                taken = len(head) + len(tail)
                raise InvalidRequest(
                    f"{field}: {taken} tokens with what stands around it, so a pair of {max_tokens} tokens "
                    "has no room for a document; shorten it",
                    field=field,
                    code="context_length_exceeded",
                )
            bodies = [body[:room] for body in bodies]
        return [PairTokens(head + body + tail) for body in bodies]

    def _reads_no_instruction(self) -> InvalidRequest:
        return InvalidRequest(f"instruction: {self._info.model} reads none; leave it out", field="instruction")

    def _render(self, query: str, instruction: str | None) -> tuple[str, str]:
        """The text before and after the document."""
        if self._qwen3:
            before, after = _QWEN3.split("{document}")
            return before.format(instruction=instruction or _QWEN3_INSTRUCTION, query=query), after
        system = [] if instruction is None else [{"role": "system", "content": instruction}]
        pair = [{"role": "query", "content": query}, {"role": "document", "content": _DOCUMENT}]
        before, _, after = self._tokenizer.apply_chat_template([*system, *pair]).rpartition(_DOCUMENT)
        return before, after


def _has_pair_template(tokenizer: Tokenizer) -> bool:
    if tokenizer.chat_template is None:
        return False
    pair = [{"role": "query", "content": _QUERY}, {"role": "document", "content": _DOCUMENT}]
    try:
        rendered = tokenizer.apply_chat_template(pair)
    except InvalidRequest:
        return False
    return rendered.count(_QUERY) == rendered.count(_DOCUMENT) == 1
