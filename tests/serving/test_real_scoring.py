"""The server on golden cross-encoders: texts over HTTP get sentence-transformers' scores (scripts/make_golden.py)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers import GOLDEN, load_golden, relative_error
from tests.serving.live_server import running


@pytest.mark.parametrize("name", ["cross-encoder", "reranker"])
def test_equal_to_sentence_transformers(name: str) -> None:
    golden, metadata = load_golden(name)
    query, texts = metadata["query"], metadata["texts"]
    model = str(GOLDEN / name)
    options = ["--port", "0", "--dtype", "float32", "--max-num-batched-tokens", "128"]
    with running(["-m", "pjengine", "serve", model, *options], seconds=180) as live:
        data = live.post("/v1/score", {"model": model, "text_1": query, "text_2": texts}).json()["data"]
        assert relative_error([entry["score"] for entry in data], golden["scores"]) < 1e-4
        ranked = live.post("/v1/rerank", {"query": query, "documents": texts}).json()["results"]
        assert [result["index"] for result in ranked] == np.argsort(-golden["scores"], kind="stable").tolist()
        huge = live.post("/v1/rerank", {"query": query, "documents": texts, "truncate_prompt_tokens": 10**30})
        assert huge.status_code == 400
        assert huge.json()["error"]["param"] == "truncate_prompt_tokens"
