"""Directories as sentence-transformers saves them: from texts to what it makes of them (scripts/make_golden.py)."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from pjengine import LLM, ConfigError, InvalidRequest
from pjengine.activations import activate
from tests.helpers import GOLDEN, load_golden, relative_error, split_rows


def test_an_embedder_with_prompts_and_dense_layers() -> None:
    golden, metadata = load_golden("sentence-transformer")
    texts = metadata["texts"]
    with LLM(str(GOLDEN / "sentence-transformer"), dtype="float32", max_num_batched_tokens=128) as llm:
        results = llm.embed(texts, use_tqdm=False) + llm.embed(texts, use_tqdm=False, prompt_name="document")
        with pytest.raises(
            InvalidRequest, match="prompt_name: the model has no prompt 'web'; known are document, query"
        ):
            llm.embed(texts, use_tqdm=False, prompt_name="web")
        with pytest.raises(InvalidRequest, match="the model's window of 48 has room for 48"):  # as its tokenizer says
            llm.embed("a" * 60, use_tqdm=False)
    assert relative_error([result.embedding for result in results], golden["embeddings"]) < 1e-4


@pytest.mark.parametrize("name", ["cross-encoder", "reranker"])
def test_scores_of_pairs(name: str) -> None:
    golden, metadata = load_golden(name)
    query, texts = metadata["query"], metadata["texts"]
    with LLM(str(GOLDEN / name), dtype="float32", max_num_batched_tokens=128) as llm:
        scores = llm.score(query, texts, use_tqdm=False)
        assert scores.shape == (len(texts),)
        assert scores.dtype == np.dtype("float32")
        assert relative_error(scores, golden["scores"]) < 1e-4
        # Most of a random model's score is common to all pairs: what tells them apart is right too.
        assert relative_error(scores - scores.mean(), golden["scores"] - golden["scores"].mean()) < 1e-3
        np.testing.assert_allclose(llm.score([query] * len(texts), texts, use_tqdm=False), scores, atol=1e-6)
        logits = llm.score(query, texts, use_tqdm=False, use_activation=False)
        np.testing.assert_allclose(activate(logits, llm._engine.info.activation), scores, rtol=1e-5)
        best = llm.rerank(query, texts, 2, use_tqdm=False)
        order = np.argsort(-golden["scores"])[:2].tolist()
        assert [(r.index, r.document) for r in best] == [(i, texts[i]) for i in order]
        assert best[0].relevance_score == pytest.approx(scores.max(), rel=1e-5)
        with pytest.raises(InvalidRequest, match="queries: 2 of them for 3 documents; give one, or as many"):
            llm.score(["a", "b"], ["c", "d", "e"])
        with pytest.raises(InvalidRequest, match=r"documents\[1\]: \d+ tokens, but the model's window of"):
            llm.score("a", ["b", "c " * 200], use_tqdm=False)
        assert llm.score("a", ["b", "c " * 200], use_tqdm=False, truncate_prompt_tokens=-1).shape == (2,)
        with pytest.raises(InvalidRequest, match=r"queries\[1\]: \d+ tokens .* no room for a document"):
            llm.score(["a", "b " * 200], ["c", "d"], use_tqdm=False, truncate_prompt_tokens=-1)
        with pytest.raises(ConfigError, match="cannot embed; use classify, score or rerank"):
            llm.embed("a")
        for wrong in (-1, "2", 1.5, True):
            with pytest.raises(InvalidRequest, match="top_n: expected an integer of at least 0, got"):
                llm.rerank(query, texts, wrong)  # type: ignore[arg-type]
        assert [r.document for r in llm.rerank(query, "abc", use_tqdm=False)] == ["abc"]
        with pytest.raises(InvalidRequest, match="query: expected a string, got None"):
            llm.rerank(None, texts)  # type: ignore[arg-type]
        for others in (None, {"text": "a"}, b"a"):
            with pytest.raises(InvalidRequest, match="documents: expected a string or a list of them, got"):
                llm.rerank(query, others)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match=r"instruction: .* reads none"):  # the reranker's template has no place
            llm.score(query, texts, instruction="judge")
        with pytest.raises(InvalidRequest, match="instruction: expected a string, got 5"):
            llm.score(query, texts, instruction=cast(Any, 5))
        for field, queries, documents in (
            ("queries[1]", ["a", "\ud800"], ["b", "c"]),
            ("documents[1]", "a", ["b", "\ud800"]),
        ):
            with pytest.raises(InvalidRequest, match="not valid Unicode") as refused:
                llm.score(queries, documents)
            assert refused.value.field == field
        with pytest.raises(InvalidRequest, match="query: not valid Unicode"):
            llm.rerank("\ud800", texts)


def test_an_embedder_scores_by_similarity() -> None:
    with LLM(str(GOLDEN / "sentence-transformer"), dtype="float32", max_num_batched_tokens=128) as llm:
        query, *texts = [result.embedding for result in llm.embed(["ab cd", "ab", "xyz", "ab cd"], use_tqdm=False)]
        expected = [query @ text / np.linalg.norm(query) / np.linalg.norm(text) for text in texts]
        np.testing.assert_allclose(llm.score("ab cd", ["ab", "xyz", "ab cd"], use_tqdm=False), expected, atol=1e-6)
        assert llm.rerank("ab cd", ["ab", "xyz", "ab cd"], 1, use_tqdm=False)[0].index == 2
        assert len(llm.embed("a" * 60, use_tqdm=False, truncate_prompt_tokens=-1)[0].prompt_token_ids) == 48
        assert len(llm.embed([[7] * 60], use_tqdm=False, truncate_prompt_tokens=5)[0].prompt_token_ids) == 5
        for wrong in (0, -2, 49, "5", 1.5, True):
            with pytest.raises(InvalidRequest, match="truncate_prompt_tokens: expected -1, or 1 to the model's window"):
                llm.embed("a", truncate_prompt_tokens=wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="dimensions: '2', but"):
            llm.embed("a", dimensions="2")  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match=r"documents\[1\]: \d+ tokens, but the model's window of 48"):
            llm.score(["a", "b"], ["c", "d " * 200], use_tqdm=False)


def test_classes(capsys: pytest.CaptureFixture[str]) -> None:
    golden, _ = load_golden("roberta-classifier")
    rows = split_rows(golden["tokens"], golden["starts"])
    with LLM(str(GOLDEN / "roberta-classifier"), dtype="float32", max_num_batched_tokens=128) as llm:
        results = llm.classify(rows)
        assert f"Classifying: 100%|██████████| {len(rows)}/{len(rows)}" in capsys.readouterr().err
        assert [result.prompt_token_ids for result in results] == rows
        expected = activate(golden["logits"], "softmax")
        assert relative_error(np.stack([result.probs for result in results]), expected) < 1e-4
        assert [result.label for result in results] == [f"LABEL_{i}" for i in golden["logits"].argmax(-1)]
        logits = [result.probs for result in llm.classify(rows, use_tqdm=False, use_activation=False)]
        assert relative_error(np.stack(logits), golden["logits"]) < 1e-4
        with pytest.raises(InvalidRequest, match="sorts texts into 3 classes and scores no pairs"):
            llm.score("a", "b")
