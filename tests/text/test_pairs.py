"""Pairs of texts: as the Rust library pairs them, in a model's own template, cut to a window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from pjengine.engine_info import EngineInfo
from pjengine.errors import InvalidRequest
from pjengine.models.sentence_files import SentenceFiles
from pjengine.models.sources import Source
from pjengine.pairs import PairEncoder
from pjengine.tokenizer import Tokenizer
from tests.text.vocabularies import byte_alphabet

DOCUMENTS = ["a red apple", "b", "", "one two three four five"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}I:{{ m.content }} {% endif %}{% endfor %}"
    "Q:{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }} "
    "D:{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}?"
)


def bert_tokenizer() -> Tokenizer:
    """A letter is a token; pairs are [CLS] first [SEP] second [SEP]."""
    words = ["[CLS]", "[SEP]", *byte_alphabet()]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[CLS]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    return Tokenizer(backend, {})


def byte_level_tokenizer(template: str | None = None) -> Tokenizer:
    """As Qwen's: words keep the space before them."""
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(byte_alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    named = [{"name": "default", "template": template}] if template else None
    return Tokenizer(backend, {"chat_template": named})


def encoder(tokenizer: Tokenizer, model_type: str, token_types: int = 0, **sentence: Any) -> PairEncoder:
    source = Source("m", "safetensors", Path("m"), {"model_type": model_type}, {}, SentenceFiles(**sentence))
    info = EngineInfo("m", "classify", vocab_size=300, max_model_len=64, token_types=token_types)
    return PairEncoder(source, tokenizer, info)


def test_segments() -> None:
    tokenizer = bert_tokenizer()
    pairs = encoder(tokenizer, "bert", token_types=2).encode("which fruit", DOCUMENTS)
    for document, pair in zip(DOCUMENTS, pairs, strict=True):
        expected = tokenizer.backend.encode("which fruit", document)
        assert (pair.token_ids, pair.token_type_ids) == (expected.ids, expected.type_ids)
        assert pair.token_type_ids == [0] * 13 + [1] * (len(document) + 1)


def test_no_segments_for_a_model_without() -> None:
    (pair,) = encoder(bert_tokenizer(), "roberta").encode("a", ["b"])
    assert pair.token_type_ids is None
    assert len(pair.token_ids) == 5


def test_documents_are_cut_queries_are_not() -> None:
    tokenizer = bert_tokenizer()
    pairs = encoder(tokenizer, "bert", token_types=2).encode("abc", ["defghi", "d"], max_tokens=9)
    assert [pair.token_ids for pair in pairs] == [tokenizer.backend.encode("abc", cut).ids for cut in ("def", "d")]
    with pytest.raises(InvalidRequest, match=r"query: 6 tokens .* a pair of 6 tokens has no room") as refused:
        encoder(tokenizer, "bert").encode("abc", ["d"], max_tokens=6)
    assert (refused.value.field, refused.value.code) == ("query", "context_length_exceeded")


def test_qwen3_reranker() -> None:
    """Its model card's prompt, although its chat template knows no query and document."""
    tokenizer = byte_level_tokenizer(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    pairs = encoder(tokenizer, "qwen3").encode("a {query}", DOCUMENTS, instruction="Find fruit")
    for document, pair in zip(DOCUMENTS, pairs, strict=True):
        text = tokenizer.decode(pair.token_ids, skip_special_tokens=False)
        assert text == (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            f"<Instruct>: Find fruit\n<Query>: a {{query}}\n<Document>: {document}<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        assert pair.token_ids == tokenizer.encode(text, add_special_tokens=False)
        assert pair.token_type_ids is None
    (default,) = encoder(tokenizer, "qwen3").encode("a", ["b"])
    assert "<Instruct>: Given a web search query, retrieve" in tokenizer.decode(default.token_ids)


def test_a_template_with_query_and_document() -> None:
    tokenizer = byte_level_tokenizer(TEMPLATE)
    prompts: dict[str, Any] = {"prompts": {"web": "search"}, "default_prompt": "web"}
    pairs = encoder(tokenizer, "qwen3", **prompts).encode("q", ["one two", ""])
    assert [tokenizer.decode(pair.token_ids) for pair in pairs] == ["I:search Q:q D:one two?", "I:search Q:q D:?"]
    (asked,) = encoder(tokenizer, "llama", **prompts).encode("q", ["d"], instruction="mine")
    assert tokenizer.decode(asked.token_ids) == "I:mine Q:q D:d?"
    (cut,) = encoder(tokenizer, "llama").encode("q", ["defghij"], max_tokens=10)
    assert tokenizer.decode(cut.token_ids) == "Q:q D:def?"
    with pytest.raises(InvalidRequest, match="query: 7 tokens"):
        encoder(tokenizer, "llama").encode("q", ["d"], max_tokens=7)


def test_instruction_for_a_model_that_reads_none() -> None:
    with pytest.raises(InvalidRequest, match="instruction: m reads none; leave it out"):
        encoder(bert_tokenizer(), "bert").encode("a", ["b"], instruction="judge")


def test_instruction_that_the_template_leaves_out() -> None:
    tokenizer = byte_level_tokenizer(TEMPLATE[TEMPLATE.index("Q:") :])
    assert tokenizer.decode(encoder(tokenizer, "llama").encode("q", ["d"])[0].token_ids) == "Q:q D:d?"
    with pytest.raises(InvalidRequest, match="instruction: m reads none; leave it out"):
        encoder(tokenizer, "llama").encode("q", ["d"], instruction="judge")


def test_lone_surrogates_are_refused() -> None:
    for tokenizer, model_type in ((bert_tokenizer(), "bert"), (byte_level_tokenizer(), "qwen3")):
        with pytest.raises(InvalidRequest, match="not valid Unicode"):
            encoder(tokenizer, model_type).encode("a", ["\ud800"])
