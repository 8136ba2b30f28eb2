"""Models, tokens, health, version, metrics and the OpenAPI document, on the fake engine."""

from __future__ import annotations

from typing import Any

import openai
import pydantic
import pytest
from prometheus_client.parser import text_string_to_metric_families

import pjengine
from pjengine.serving.app import ENDPOINTS
from tests.serving.live_server import LiveServer, wait_for


def test_models(server: LiveServer) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["fake", "team/fake"]
    model = client.models.retrieve("team/fake")
    assert (model.id, model.object, model.owned_by) == ("team/fake", "model", "pjengine")
    assert model.max_model_len == 512  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_every_served_name_works(server: LiveServer) -> None:
    for name in ("fake", "team/fake"):
        assert server.post("/v1/completions", {"model": name, "prompt": "a"}).json()["model"] == "fake"


def test_health_and_version(server: LiveServer) -> None:
    assert server.get("/health").status_code == 200
    assert server.get("/version").json() == {"version": pjengine.__version__}


def test_tokenize_and_back(server: LiveServer) -> None:
    answer = server.post("/tokenize", {"model": "fake", "prompt": "añb"}).json()
    assert answer == {"count": 4, "max_model_len": 512, "tokens": [97, 195, 177, 98], "token_strs": None}
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "añb"}


def test_tokenize_shows_special_tokens(server: LiveServer) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "return_token_strs": True}
    answer = server.post("/tokenize", body).json()
    assert answer["token_strs"] == ["<s>", "<|user|>", "a", "<|assistant|>"]
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json()["prompt"] == "<s><|user|>a<|assistant|>"
    assert server.post("/tokenize", {**body, "add_generation_prompt": False}).json()["count"] == 3


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/detokenize", {"tokens": [262]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_bad_tokens(server: LiveServer, path: str, body: dict[str, object], param: str) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_long_texts_are_tokenized_too(server: LiveServer) -> None:
    assert server.post("/tokenize", {"prompt": "ab" * 50_000}).json()["count"] == 100_000


def test_metrics(server: LiveServer) -> None:
    before = server.wait_idle()
    server.client().completions.create(model="fake", prompt="abc", max_tokens=10, n=2)
    server.client().completions.create(model="fake", prompt="abcd", max_tokens=300, stop="dab")
    tokens = "pjengine_prompt_tokens_total"
    # The answer of a text that a stop string ends is there before the engine has reported its end.
    wait_for(lambda: server.metrics()[tokens] == before.get(tokens, 0) + 3 + 4)
    after = server.wait_idle()

    def grew(series: str) -> float:
        return after[series] - before.get(series, 0)

    assert 20 + 6 <= grew("pjengine_generation_tokens_total") < 100
    assert grew("pjengine_time_to_first_token_seconds_count") == 3
    assert 18 + 5 <= grew("pjengine_inter_token_latency_seconds_count") < 100
    assert grew("pjengine_request_latency_seconds_count") == 3
    assert grew("pjengine_request_queue_seconds_count") == 3
    assert 0 < grew("pjengine_time_to_first_token_seconds_sum") <= grew("pjengine_request_latency_seconds_sum")
    assert grew('pjengine_requests_finished_total{finish_reason="length"}') == 2
    assert grew('pjengine_requests_finished_total{finish_reason="stop"}') == 1
    assert after[f'pjengine_info{{model="fake",version="{pjengine.__version__}"}}'] == 1


def test_metrics_are_prometheus_text(server: LiveServer) -> None:
    families = {family.name: family.type for family in text_string_to_metric_families(server.get("/metrics").text)}
    assert families["pjengine_requests_running"] == "gauge"
    assert families["pjengine_kv_cache_usage_ratio"] == "gauge"
    assert families["pjengine_preemptions"] == "counter"
    assert families["pjengine_prefix_cache_hit_tokens"] == "counter"
    assert families["pjengine_inter_token_latency_seconds"] == "histogram"
    assert all(name.startswith("pjengine_") for name in families)


def test_openapi_lists_every_endpoint(server: LiveServer) -> None:
    document = server.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    found = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert found == {(endpoint.method, endpoint.path.replace(":path", "")) for endpoint in ENDPOINTS}
    schemas = document["components"]["schemas"]
    assert schemas["ChatCompletionRequest"]["additionalProperties"] is False
    assert schemas["ChatCompletionRequest"]["required"] == ["messages"]
    text = server.get("/openapi.json").text
    refs = {ref.split('"')[0] for ref in text.split("#/components/schemas/")[1:]}
    assert refs <= set(schemas)


@pytest.mark.parametrize("endpoint", [e for e in ENDPOINTS if e.response], ids=lambda e: e.path)
def test_answers_are_as_documented(
    server: LiveServer, embedder: LiveServer, classifier: LiveServer, endpoint: Any
) -> None:
    """No field more and none less than the response models, which the document is made of, have."""
    bodies: dict[str, Any] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True},
        "/v1/completions": {"prompt": "a", "logprobs": 1, "echo": True},
        "/v1/embeddings": {"input": "a"},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [97]},
        "/rerank": {"query": "a", "documents": ["b", {"text": "c"}]},
        "/score": {"text_1": "a", "text_2": "b"},
        "/classify": {"input": "a"},
    }
    path = endpoint.path.replace("{model:path}", "fake")
    name = "/" + path.rsplit("/", 1)[1]
    bodies |= {path: bodies.get(path, bodies.get(name))}
    live = {"/embeddings": embedder, "/rerank": embedder, "/score": embedder, "/classify": classifier}.get(name, server)
    answer = live.post(path, bodies[path]) if endpoint.request else live.get(path)
    strict = pydantic.create_model(endpoint.response.__name__, __base__=endpoint.response, __config__=None)
    assert strict.model_validate_json(answer.content).model_dump(mode="json") == answer.json()
