"""Scores, ranks and classes over HTTP, on fake engines (tests/serving/fake_engine.py) whose numbers are known."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.serving.live_server import LiveServer

DOCUMENTS = ["none", "three!!!", "one!", "two!!"]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def scores(live: LiveServer, body: dict[str, Any], path: str = "/v1/score") -> list[float]:
    answer = live.post(path, body)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return [entry["score"] for entry in data]


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
def test_one_with_many(reranker: LiveServer, path: str) -> None:
    expected = [sigmoid(n - 1) for n in (0, 3, 1, 2)]
    for first, second in (("text_1", "text_2"), ("queries", "documents")):
        assert scores(reranker, {first: "q", second: DOCUMENTS}, path) == pytest.approx(expected)
        assert scores(reranker, {first: ["q"], second: DOCUMENTS}, path) == pytest.approx(expected)


def test_one_with_one_and_many_with_many(reranker: LiveServer) -> None:
    assert scores(reranker, {"text_1": "q!", "text_2": "d!"}) == pytest.approx([sigmoid(1)])
    body = {"queries": ["!", "!", "!!", ""], "documents": ["a", "!", "b", "!"]}
    assert scores(reranker, body) == pytest.approx([sigmoid(n) for n in (0, 1, 1, 0)])


def test_logits_where_asked(reranker: LiveServer) -> None:
    body = {"text_1": "q", "text_2": DOCUMENTS, "use_activation": False}
    assert scores(reranker, body) == [-1, 2, 0, 1]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_rerank(reranker: LiveServer, path: str) -> None:
    body = {"model": "fake", "query": "q", "documents": [DOCUMENTS[0], {"text": DOCUMENTS[1]}, *DOCUMENTS[2:]]}
    answer = reranker.post(path, body).json()
    assert [result["index"] for result in answer["results"]] == [1, 3, 2, 0]
    assert [result["document"]["text"] for result in answer["results"]] == ["three!!!", "two!!", "one!", "none"]
    assert [r["relevance_score"] for r in answer["results"]] == pytest.approx([sigmoid(n) for n in (2, 1, 0, -1)])
    tokens = sum(len("q" + text) for text in DOCUMENTS)
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["total_tokens"]) == (tokens, tokens)
    best = reranker.post(path, {**body, "top_n": 2, "return_documents": False}).json()["results"]
    assert [(result["index"], result["document"]) for result in best] == [(1, None), (3, None)]
    assert len(reranker.post(path, {**body, "top_n": 9}).json()["results"]) == 4


def test_equal_scores_keep_their_order(reranker: LiveServer) -> None:
    body = {"query": "q", "documents": ["a!", "b", "c!", "d", "e!"]}
    assert [r["index"] for r in reranker.post("/rerank", body).json()["results"]] == [0, 2, 4, 1, 3]


def test_long_documents_are_cut_where_asked(reranker: LiveServer) -> None:
    body: dict[str, Any] = {"query": "qq", "documents": ["short!", "x" * 600 + "!"]}
    refused = reranker.post("/rerank", body)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == ("documents[1]", "context_length_exceeded")
    answer = reranker.post("/rerank", {**body, "truncate_prompt_tokens": -1}).json()
    assert [result["index"] for result in answer["results"]] == [0, 1]
    assert answer["usage"]["prompt_tokens"] == len("qqshort!") + 512
    assert reranker.post("/rerank", {**body, "truncate_prompt_tokens": 4}).json()["usage"]["prompt_tokens"] == 4 + 4


def test_an_embedder_scores_by_similarity(embedder: LiveServer) -> None:
    """The fake embedding is (token count, first id, last id, 0.1)."""
    found = scores(embedder, {"text_1": "ab", "text_2": ["ab", "zzzzzz"]})
    a, b = (2, ord("a"), ord("b"), 0.1), (6, ord("z"), ord("z"), 0.1)
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    expected = [1, dot / math.dist(a, (0, 0, 0, 0)) / math.dist(b, (0, 0, 0, 0))]
    assert found == pytest.approx(expected, rel=1e-5)
    assert scores(embedder, {"queries": ["ab", "ab"], "documents": ["ab", "zzzzzz"]}) == pytest.approx(found)
    ranked = embedder.post("/rerank", {"query": "ab", "documents": ["zzzzzz", "ab"]}).json()
    assert [result["index"] for result in ranked["results"]] == [1, 0]
    assert ranked["usage"]["prompt_tokens"] == 2 + 6 + 2  # the query is embedded once


@pytest.mark.parametrize("path", ["/v1/classify", "/classify"])
def test_classify(classifier: LiveServer, path: str) -> None:
    answer = classifier.post(path, {"input": ["ggb", "bb"]}).json()
    assert [(entry["index"], entry["label"], entry["num_classes"]) for entry in answer["data"]] == [
        (0, "good", 2),
        (1, "bad", 2),
    ]
    first, second = (entry["probs"] for entry in answer["data"])
    assert first == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])
    assert second == pytest.approx([1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))])
    assert answer["usage"]["prompt_tokens"] == 5
    raw = classifier.post(path, {"input": [ord("g"), ord("b")], "use_activation": False}).json()["data"]
    assert [entry["probs"] for entry in raw] == [[1, 1]]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/score", {}, None),
        ("/score", {"text_1": "a", "documents": "b"}, None),
        ("/score", {"text_1": "a"}, None),
        ("/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1"),
        ("/score", {"text_1": 1, "text_2": "a"}, "text_1"),
        ("/score", {"text_1": "a", "text_2": ["b", 2]}, "text_2[1]"),
        ("/score", {"text_1": "a" * 600, "text_2": "b", "truncate_prompt_tokens": -1}, "text_1"),
        ("/score", {"text_1": "a", "text_2": "b", "instruction": "judge"}, "instruction"),
        ("/rerank", {"query": "a"}, "documents"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": ["a"], "documents": ["b"]}, "query"),
        ("/rerank", {"query": "a", "documents": [{"title": "b"}]}, "documents[0].text"),
        ("/rerank", {"query": "a", "documents": [5]}, "documents[0]"),
        ("/rerank", {"query": "a", "documents": ["b"] * 2049}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/rerank", {"query": "a", "documents": ["b"], "rank_fields": ["x"]}, "rank_fields"),
        ("/rerank", {"query": "a", "documents": ["b"], "model": "other"}, "model"),
    ],
)
def test_bad_pairs(reranker: LiveServer, path: str, body: dict[str, Any], param: str | None) -> None:
    answer = reranker.post(path, body)
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    assert answer.json()["error"]["param"] == param


def test_models_of_other_kinds(
    server: LiveServer, embedder: LiveServer, reranker: LiveServer, classifier: LiveServer
) -> None:
    pair, text = {"text_1": "a", "text_2": "b"}, {"input": "a"}
    rank: dict[str, Any] = {"query": "a", "documents": ["b"]}
    said: dict[str, list[tuple[LiveServer, str, dict[str, Any]]]] = {
        "model: fake generates text and does not score pairs of texts": [
            (server, "/score", pair),
            (server, "/rerank", rank),
        ],
        "model: fake generates text and does not classify": [(server, "/classify", text)],
        "model: fake embeds text and does not classify": [(embedder, "/classify", text)],
        "model: fake classifies text and does not embed": [(reranker, "/v1/embeddings", text)],
        "model: fake classifies text and does not generate": [(reranker, "/v1/completions", {"prompt": "a"})],
        "model: fake sorts texts into 2 classes and scores no pairs; classify with it": [
            (classifier, "/score", pair),
            (classifier, "/rerank", rank),
        ],
    }
    for message, calls in said.items():
        for live, path, body in calls:
            answer = live.post(path, body)
            error = answer.json()["error"]
            assert (answer.status_code, error["message"], error["param"]) == (400, message, "model")
