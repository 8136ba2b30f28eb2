"""Whatever JSON comes in, the answer is 200 or a 4xx in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pjengine.serving.protocol.chat import ChatCompletionRequest
from pjengine.serving.protocol.completions import CompletionRequest
from pjengine.serving.protocol.embeddings import EmbeddingRequest
from pjengine.serving.protocol.scoring import ClassifyRequest, RerankRequest, ScoreRequest
from pjengine.serving.protocol.tokens import DetokenizeRequest, TokenizeRequest
from tests.serving.live_server import LiveServer

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.floats(-3, 3)
    | st.sampled_from([1e308, float("nan"), float("inf")])
    | st.text(st.characters(), max_size=8)  # lone surrogates too
    | st.sampled_from(["user", "fake", "text", "auto", "5", "<eos>"])
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]) | scalars, "content": st.text(max_size=5) | scalars}
)
values = st.recursive(
    scalars | messages,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def bodies(model: Any, required: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Mostly right: the required fields, and a few others with any value."""
    some = st.dictionaries(st.sampled_from(sorted(model.model_fields)), values, max_size=2)
    return st.builds(lambda fixed, extra: {**fixed, **extra}, st.fixed_dictionaries(required), some)


BODIES: dict[str, st.SearchStrategy[Any]] = {
    "/v1/completions": bodies(CompletionRequest, {"prompt": st.text(max_size=5) | values, "max_tokens": st.just(3)}),
    "/v1/chat/completions": bodies(
        ChatCompletionRequest, {"messages": st.lists(messages, max_size=2), "max_tokens": st.just(3)}
    ),
    "/tokenize": bodies(TokenizeRequest, {"prompt": st.text(max_size=5)}),
    "/v1/embeddings": bodies(EmbeddingRequest, {"input": st.text(max_size=5) | values}),
    "/rerank": bodies(
        RerankRequest, {"query": st.text(max_size=5), "documents": st.lists(st.text(max_size=5) | values)}
    ),
    "/score": bodies(ScoreRequest, {"text_1": st.text(max_size=5), "text_2": st.text(max_size=5) | values}),
    "/classify": bodies(ClassifyRequest, {"input": st.text(max_size=5) | values}),
    "/detokenize": bodies(DetokenizeRequest, {"tokens": st.lists(st.integers(-1, 270), max_size=3)}),
}


@pytest.mark.parametrize("path", BODIES)
def test_any_json(
    server: LiveServer, embedder: LiveServer, reranker: LiveServer, classifier: LiveServer, path: str
) -> None:
    kinds = {"/v1/embeddings": embedder, "/rerank": reranker, "/score": embedder, "/classify": classifier}
    live, statuses = kinds.get(path, server), set()

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(BODIES[path])
    def check(body: Any) -> None:
        content = json.dumps(body).encode()
        answer = live.http.post(live.url + path, content=content)
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), answer.text
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert error["message"]
        elif b'"stream": true' in content:
            assert answer.text.endswith("data: [DONE]\n\n")
            assert '"error"' not in answer.text

    check()
    assert 200 in statuses
    assert 400 in statuses
    assert "Traceback" not in live.log
    live.wait_idle()
