"""What is wrong is answered with a 4xx in OpenAI's shape that names the field, and harms no other request."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.serving.live_server import LiveServer, fake_command, running

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module", autouse=True)
def others_are_unharmed(server: LiveServer) -> Iterator[None]:
    """A request streams all through this module's tests, and what it gets is right."""
    stop = threading.Event()
    wrong: list[str] = []
    rounds = 0

    def run() -> None:
        nonlocal rounds
        client = server.client()
        while not stop.is_set():
            chunks = client.completions.create(model="fake", prompt="other ", max_tokens=60, stream=True)
            text = "".join(chunk.choices[0].text for chunk in chunks)
            wrong.extend([text] if text != "other " * 10 else [])
            rounds += 1

    thread = threading.Thread(target=run)
    thread.start()
    yield
    stop.set()
    thread.join()
    assert rounds > 0
    assert wrong == []


def check_error(answer: httpx.Response, status: int, param: str | None, code: str | None = None) -> str:
    """Returns the message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert code is None or error["code"] == code, error
    assert param is None or param in error["message"], error
    return error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
        ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": "a", "colour": "red"}]}, "messages[0].colour"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"max_tokens": 600}, "max_tokens"),
        ({"max_completion_tokens": 510}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 10**30}, "n"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"262": 1}}, "logit_bias"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": None}}, "logit_bias.5"),
        ({"allowed_token_ids": [262]}, "allowed_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"bad_words": [""]}, "bad_words"),
        ({"seed": 2**65}, "seed"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"functions": []}, "functions"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": ["a"]}, "chat_template_kwargs"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"prediction": {}}, "prediction"),
        ({"temprature": 1}, "temprature"),
        ({"model": 5}, "model"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_chat_fields(server: LiveServer, fields: dict[str, Any], param: str | None, stream: bool) -> None:
    check_error(server.post(CHAT, {"messages": HELLO, "model": "fake", "stream": stream, **fields}), 400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [97, "a"]}, "prompt[1]"),
        ({"prompt": [97.5]}, "prompt[0]"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [262]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": [[97], [400]]}, "prompt"),
        ({"prompt": "x" * 512}, "prompt"),
        ({"prompt": [97] * 10_000}, "prompt"),
        ({"max_tokens": 512}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"stream_options": {"include_usage": True, "extra": 1}, "stream": True}, "stream_options.extra"),
    ],
)
def test_completion_fields(server: LiveServer, fields: dict[str, Any], param: str) -> None:
    check_error(server.post(COMPLETIONS, {"prompt": "a", **fields}), 400, param)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": -1}, "greater than or equal to 0, got -1"),
        ({"max_tokens": "many"}, "got 'many'"),
        ({"n": 10**30}, f"got 1{'0' * 30}"),
        ({"stream": "x" * 1000}, f"got '{'x' * 59}"),
        ({"temperature": True}, "got True"),
    ],
)
def test_the_message_holds_the_value(server: LiveServer, fields: dict[str, Any], said: str) -> None:
    (field,) = fields
    message = check_error(server.post(COMPLETIONS, {"prompt": "a", **fields}), 400, field)
    assert message.endswith(said)


def test_missing_field(server: LiveServer) -> None:
    check_error(server.post(CHAT, {"model": "fake"}), 400, "messages", "missing_required_parameter")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"prompt": "a",}', 400),
        (b'{"prompt": "\xff\xfe"}', 400),
        (b"\xff\xfe\x00", 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "a", "temperature": Infinity}', 400),
        (b"[" * 100_000, 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"null", 400),
    ],
)
def test_bodies_that_are_no_json_object(server: LiveServer, body: bytes, status: int) -> None:
    answer = httpx.post(server.url + COMPLETIONS, content=body, timeout=30)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize"])
def test_unknown_model(server: LiveServer, path: str) -> None:
    body = {"messages": HELLO} if path == CHAT else {"prompt": "a"}
    check_error(server.post(path, {"model": "gpt-4", **body}), 404, "model", "model_not_found")


def test_the_client_raises_the_right_types(server: LiveServer) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="fake", prompt="a", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="unknown parameter"):
        client.completions.create(model="fake", prompt="a", extra_body={"top_q": 1})


def test_wrong_path_and_method(server: LiveServer) -> None:
    check_error(server.get("/v1/nothing"), 404, None, "not_found")
    answer = server.get(COMPLETIONS)
    check_error(answer, 405, None, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    check_error(server.post("/v1/models", {}), 405, None)


def test_body_of_50_mb(server: LiveServer) -> None:
    body = json.dumps({"prompt": "x" * 50_000_000}).encode()
    check_error(httpx.post(server.url + COMPLETIONS, content=body, timeout=60), 413, None, "body_too_large")


def test_body_of_50_mb_without_a_length(server: LiveServer) -> None:
    """Sent in chunks: only what arrives tells how long it is."""
    answer = httpx.post(server.url + COMPLETIONS, content=(b" " * 1_000_000 for _ in range(50)), timeout=60)
    check_error(answer, 413, None, "body_too_large")


def test_long_bodies_are_not_held_in_memory() -> None:
    with running(fake_command(max_body_bytes=1000)) as small:
        before = _peak_memory(small)
        answer = httpx.post(small.url + COMPLETIONS, content=(b" " * 1_000_000 for _ in range(50)), timeout=60)
        assert answer.status_code in (413, 400)
        assert _peak_memory(small) - before < 30_000_000
        assert small.post(COMPLETIONS, {"prompt": "a"}).status_code == 200


def test_a_request_that_is_no_http(server: LiveServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"\x00\x01\x02 what\r\n\r\n")
        assert b"400" in connection.recv(1000)


def test_an_error_of_the_engine_is_this_request_s_alone(server: LiveServer) -> None:
    series = 'pjengine_requests_finished_total{finish_reason="error"}'
    before = server.metrics().get(series, 0)
    answer = server.post(COMPLETIONS, {"prompt": "<fail>"})
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "this request cannot be computed",
        "type": "server_error",
        "param": None,
        "code": "generation_failed",
    }
    with pytest.raises(openai.APIError, match="cannot be computed"):
        list(server.client().completions.create(model="fake", prompt="<fail>", stream=True))
    assert server.metrics()[series] - before == 2


def test_a_prompt_among_several_that_fails_frees_the_others(server: LiveServer) -> None:
    assert server.post(COMPLETIONS, {"prompt": ["a" * 50, "<fail>"], "max_tokens": 400}).status_code == 500


@pytest.fixture(scope="module")
def locked() -> Iterator[LiveServer]:
    """Asks for a key."""
    with running(fake_command(api_key="sésame")) as live:
        yield live


class TestKey:
    @pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer x", "sésame", "Basic sésame", "Bearer sésamex"])
    def test_wrong(self, locked: LiveServer, header: str | None) -> None:
        headers = {} if header is None else {"authorization": header.encode()}
        for answer in (
            locked.post(CHAT, {"messages": HELLO}, headers=headers),
            locked.get("/v1/models", headers=headers),
            locked.get("/nothing", headers=headers),
        ):
            check_error(answer, 401, None, "invalid_api_key")

    def test_right(self, locked: LiveServer) -> None:
        headers = {"authorization": "Bearer sésame".encode()}
        assert locked.get("/v1/models", headers=headers).status_code == 200

    def test_health_and_metrics_are_open(self, locked: LiveServer) -> None:
        assert locked.get("/health").status_code == 200
        assert locked.get("/metrics").status_code == 200

    def test_the_client(self, locked: LiveServer) -> None:
        with pytest.raises(openai.AuthenticationError):
            locked.client(api_key="wrong").models.list()


class TestOverload:
    def test_503_with_retry_after(self) -> None:
        with running(fake_command(config={"max_waiting": 1}, engine={"max_running": 1, "step_seconds": 0.05})) as small:
            client = small.client()
            streams = [
                client.completions.create(model="fake", prompt="a", max_tokens=200, stream=True) for _ in range(2)
            ]
            for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}, {"prompt": ["a", "b"]}):
                answer = small.post(COMPLETIONS, body)
                check_error(answer, 503, None, "overloaded")
                assert answer.headers["retry-after"] == "3"
            for stream in streams:
                stream.close()
            small.wait_idle()
            assert small.post(COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 1}).status_code == 200
            for body in ({"prompt": ["a", "b", "c"]}, {"prompt": "a", "n": 3, "stream": True}):  # not told to retry
                answer = small.post(COMPLETIONS, body)
                check_error(answer, 400, None, "too_many_inputs")
                assert "at most 2 may run and wait here" in answer.json()["error"]["message"]


def _peak_memory(server: LiveServer) -> int:
    with open(f"/proc/{server.process.pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
