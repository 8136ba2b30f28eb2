"""The server on all-MiniLM-L6-v2, through the openai client."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests.helpers import load_golden
from tests.serving.live_server import LiveServer, running

pytestmark = pytest.mark.real

MODEL = "all-minilm-l6-v2"


@pytest.fixture(scope="module")
def minilm() -> Iterator[LiveServer]:
    with running(["-m", "pjengine", "serve", MODEL, "--port", "0", "--dtype", "float32"], seconds=180) as live:
        yield live


def embed(server: LiveServer, inputs: list[str] | list[list[int]], encoding_format: str = "base64") -> np.ndarray:
    arguments: dict[str, Any] = {"encoding_format": "float"} if encoding_format == "float" else {}
    answer = server.client().embeddings.create(model=MODEL, input=inputs, **arguments)  # base64 is the client's default
    return np.array([entry.embedding for entry in answer.data])


def test_equal_to_sentence_transformers(minilm: LiveServer) -> None:
    golden, metadata = load_golden(MODEL)
    texts, expected = metadata["texts"], golden["embeddings"]
    lengths = np.diff(golden["starts"])
    assert (lengths == 256).any()  # sentence-transformers cuts to the window
    assert len(texts) >= 28
    cut = {"truncate_prompt_tokens": -1}
    answer = minilm.client().embeddings.create(model=MODEL, input=texts, extra_body=cut)
    assert answer.usage.prompt_tokens == lengths.sum()
    found = np.array([entry.embedding for entry in answer.data])
    similarity = (found * expected).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert similarity.min() > 1 - 1e-4
    short = [i for i, text in enumerate(texts) if len(text) < 500]
    np.testing.assert_allclose(embed(minilm, [texts[i] for i in short], "float"), found[short], rtol=0, atol=1e-6)


def test_the_log_is_lines_and_the_knee_is_told_at_once(minilm: LiveServer) -> None:
    assert "\r" not in minilm.log, "no progress bars where nobody looks"
    found = minilm.metrics()
    assert found["pjengine_batch_budget_tokens"] == found["pjengine_knee_tokens"] > 0
    assert found["pjengine_knee_seconds"] > 0


def test_token_ids_are_taken_as_they_are(minilm: LiveServer) -> None:
    texts = ["a red apple", "the theory of relativity"]
    ids = [minilm.post("/tokenize", {"prompt": text}).json()["tokens"] for text in texts]
    np.testing.assert_allclose(embed(minilm, ids), embed(minilm, texts), rtol=0, atol=1e-6)


def test_a_text_without_characters_has_its_special_tokens(minilm: LiveServer) -> None:
    for given in ("", [""]):
        assert minilm.post("/v1/embeddings", {"input": given}).json()["usage"]["prompt_tokens"] == 2


def test_many_clients_get_their_own(minilm: LiveServer) -> None:
    texts = [f"text number {i} " + "and more " * (i % 7) for i in range(64)]
    with ThreadPoolExecutor(16) as pool:
        found = np.concatenate(list(pool.map(lambda text: embed(minilm, [text]), texts)))
    np.testing.assert_allclose(found, embed(minilm, texts), rtol=0, atol=1e-5)
    minilm.wait_idle()


def test_too_long_a_text(minilm: LiveServer) -> None:
    answer = minilm.post("/v1/embeddings", {"input": "word " * 1000})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input"
    assert answer.json()["error"]["code"] == "context_length_exceeded"
