"""/v1/embeddings through the openai client; the fake embedding is (token count, first id, last id, 0.1)."""

from __future__ import annotations

import base64
import struct
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serving.fake_engine import make_tokenizer
from tests.serving.live_server import LiveServer, fake_command, running


def test_texts(embedder: LiveServer) -> None:
    ids = make_tokenizer().encode("abc")
    answer = embedder.client().embeddings.create(model="fake", input=["abc", "a"], encoding_format="float")
    assert answer.object == "list"
    assert [e.index for e in answer.data] == [0, 1]
    assert answer.data[0].embedding == pytest.approx([3, ids[0], ids[-1], 0.1])
    assert answer.data[1].embedding == pytest.approx([1, ids[0], ids[0], 0.1])
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (4, 4)


def test_the_client_decodes_base64_to_the_same(embedder: LiveServer) -> None:
    client = embedder.client()  # asks for base64 unless told otherwise
    by_base64 = client.embeddings.create(model="fake", input="abc").data[0].embedding
    floats = client.embeddings.create(model="fake", input="abc", encoding_format="float").data[0].embedding
    assert np.array(by_base64, np.float32).tolist() == np.array(floats, np.float32).tolist()


def test_base64_is_little_endian_float32(embedder: LiveServer) -> None:
    body = {"input": [5, 6, 7], "encoding_format": "base64"}
    found = embedder.post("/v1/embeddings", body).json()["data"][0]["embedding"]
    assert struct.unpack("<4f", base64.b64decode(found)) == pytest.approx((3, 5, 7, 0.1))


def test_token_ids(embedder: LiveServer) -> None:
    client = embedder.client()
    one = client.embeddings.create(model="fake", input=[5, 6, 7], encoding_format="float")
    assert [e.embedding[:3] for e in one.data] == [[3, 5, 7]]
    two = client.embeddings.create(model="fake", input=[[5, 6, 7], [8]], encoding_format="float")
    assert [e.embedding[:3] for e in two.data] == [[3, 5, 7], [1, 8, 8]]


def test_no_encoding_format_is_float(embedder: LiveServer) -> None:
    for given in ({}, {"encoding_format": None}):
        answer = embedder.post("/v1/embeddings", {"input": [5, 6, 7], **given})
        assert answer.json()["data"][0]["embedding"] == pytest.approx([3, 5, 7, 0.1])


def test_many_inputs_keep_their_order(embedder: LiveServer) -> None:
    answer = embedder.client().embeddings.create(model="fake", input=[[i] for i in range(250)], encoding_format="float")
    assert [e.embedding[1] for e in answer.data] == list(range(250))


def test_dimensions(embedder: LiveServer) -> None:
    def first(**options: Any) -> np.ndarray:
        answer = embedder.client().embeddings.create(model="fake", input=[5, 6, 7], **options)
        return np.array(answer.data[0].embedding)

    whole, short = first(), first(dimensions=2)
    np.testing.assert_allclose(short, whole[:2] / np.linalg.norm(whole[:2]), rtol=1e-6)
    np.testing.assert_allclose(first(dimensions=4), whole / np.linalg.norm(whole), rtol=1e-6)
    np.testing.assert_allclose(first(dimensions=2, encoding_format="float"), short, rtol=1e-6)
    answer = embedder.post("/v1/embeddings", {"input": "a", "dimensions": 5})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "dimensions: 5, but the embeddings of fake have 4 elements; ask for 1 to 4"
    )


def test_floats_are_the_float32_values(embedder: LiveServer) -> None:
    found = embedder.post("/v1/embeddings", {"input": [5, 6, 7]})
    assert '"embedding":[3.0,5.0,7.0,0.1]' in found.text  # and not 0.10000000149011612


def test_long_inputs_are_cut_where_asked(embedder: LiveServer) -> None:
    def tokens(text: str | list[int], length: int | None) -> list[float]:
        answer = embedder.post("/v1/embeddings", {"input": text, "truncate_prompt_tokens": length})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens"] == answer.json()["data"][0]["embedding"][0]
        found: list[float] = answer.json()["data"][0]["embedding"][:3]
        return found

    assert tokens("abcdef", 3) == [3, ord("a"), ord("c")]
    assert tokens("ab", 3) == [2, ord("a"), ord("b")]
    assert tokens("x" * 600 + "y", -1) == [512, ord("x"), ord("x")]
    assert tokens([1, 2, 3, 4], 2) == [2, 1, 2]


def test_prompts_of_the_model(embedder: LiveServer) -> None:
    def tokens(**fields: Any) -> int:
        found: int = embedder.post("/v1/embeddings", {"input": "abc", **fields}).json()["usage"]["prompt_tokens"]
        return found

    assert (tokens(), tokens(prompt_name=""), tokens(prompt_name="query")) == (3, 3, 3 + len("find: "))


def test_2048_inputs_and_no_more(embedder: LiveServer) -> None:
    answer = embedder.post("/v1/embeddings", {"input": ["a"] * 2048, "input_type": "document"})
    assert len(answer.json()["data"]) == 2048
    refused = embedder.post("/v1/embeddings", {"input": [[1]] * 2049})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "input: has 2049 inputs; send at most 2048 a request"


def test_more_inputs_than_may_ever_wait() -> None:
    """A 503 would have clients try again for ever."""
    with running(fake_command(config={"max_waiting": 4}, engine={"kind": "embed"})) as small:
        refused = small.post("/v1/embeddings", {"input": ["a"] * 5})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == (
            "5 inputs, but at most 4 may wait here (--max-waiting); send fewer in a request"
        )
        assert len(small.post("/v1/embeddings", {"input": ["a"] * 4}).json()["data"]) == 4


def test_a_failing_input_fails_the_request_alone(embedder: LiveServer) -> None:
    answer = embedder.post("/v1/embeddings", {"input": ["a", "<fail>"]})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "this request cannot be computed"
    assert embedder.post("/v1/embeddings", {"input": "a"}).status_code == 200


def test_metrics_of_every_end() -> None:
    def ends(found: dict[str, float]) -> dict[str, float]:
        names = [f'requests_finished_total{{finish_reason="{reason}"}}' for reason in ("stop", "error", "abort")]
        names += ["request_latency_seconds_count", "request_queue_seconds_count"]
        return {name: found[f"pjengine_{name}"] for name in names}

    with running(fake_command(engine={"kind": "embed", "step_seconds": 0.2, "max_running": 2})) as live:
        assert live.post("/v1/embeddings", {"input": ["a", "b", "c"]}).status_code == 200
        assert list(ends(live.wait_idle()).values()) == [3, 0, 0, 3, 3]
        assert live.post("/v1/embeddings", {"input": ["<fail>", "a", "b"]}).status_code == 500
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.url}/v1/embeddings", json={"input": ["a"] * 20}, timeout=0.7)
        live.wait_idle()
        found = ends(live.metrics())
        assert sum(list(found.values())[:3]) == 3 + 3 + 20
        assert found['requests_finished_total{finish_reason="error"}'] == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": "a", "prompt_name": "passage"}, "prompt_name"),
        ({"input": [1, 2], "prompt_name": "query"}, "prompt_name"),
        ({"input": ["a", 1]}, "input[1]"),
        ({"input": "x" * 513}, "input"),
        ({"input": [400]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": 513}, "truncate_prompt_tokens"),
        ({"input": "a", "input_type": "clustering"}, "input_type"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "inputs": "a"}, "inputs"),
        ({}, "input"),
    ],
)
def test_bad_input(embedder: LiveServer, body: dict[str, object], param: str) -> None:
    answer = embedder.post("/v1/embeddings", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_model_of_the_other_kind(embedder: LiveServer, server: LiveServer) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for answer in (
        embedder.post("/v1/chat/completions", chat),
        embedder.post("/v1/completions", {"prompt": "a"}),
        server.post("/v1/embeddings", {"input": "a"}),
    ):
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "model"
        assert "does not" in answer.json()["error"]["message"]
