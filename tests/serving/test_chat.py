"""/v1/chat/completions through the openai client, on the fake engine: it repeats the rendered conversation."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving.live_server import LiveServer

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
# The conversation is <s><|user|>hello<|assistant|>: special tokens are generated, but are no part of the text.
REPEATED = "hello"


def test_whole(server: LiveServer) -> None:
    answer = server.client().chat.completions.create(model="fake", messages=HELLO, max_completion_tokens=9)
    assert answer.object == "chat.completion"
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == REPEATED
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 9)


def test_streamed(server: LiveServer) -> None:
    chunks = list(
        server.client().chat.completions.create(
            model="fake", messages=HELLO, max_tokens=9, stream=True, stream_options={"include_usage": True}, n=2
        )
    )
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    first = [chunk.choices[0] for chunk in chunks[:2]]
    assert [(choice.index, choice.delta.role, choice.delta.content) for choice in first] == [
        (0, "assistant", ""),
        (1, "assistant", ""),
    ]
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "hello", 1: "hello"}
    assert sorted(c.index for chunk in chunks for c in chunk.choices if c.finish_reason == "length") == [0, 1]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 18
    assert chunks[-1].choices == []


def test_no_usage_unless_asked_for(server: LiveServer) -> None:
    chunks = list(server.client().chat.completions.create(model="fake", messages=HELLO, max_tokens=3, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_max_tokens_is_the_window_by_default(server: LiveServer) -> None:
    answer = server.client().chat.completions.create(model="fake", messages=HELLO)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 512


def test_content_parts_and_roles(server: LiveServer) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "be "},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "rief"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]},
        {"role": "tool", "content": "!", "tool_call_id": "1"},
    ]
    found = server.post("/tokenize", {"messages": messages, "return_token_strs": True}).json()["token_strs"]
    assert "".join(found) == "<s><|system|>be <|user|>b\nrief<|assistant|><|tool|>!<|assistant|>"


def test_an_answer_can_be_sent_back(server: LiveServer) -> None:
    """SDKs send an answer's message as it came, null fields included."""
    client = server.client()
    message = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=9).choices[0].message
    messages: list[Any] = [*HELLO, message.model_dump(), *HELLO]
    assert client.chat.completions.create(model="fake", messages=messages, max_tokens=3).choices


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(server: LiveServer, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "é"}]
    arguments: dict[str, Any] = {
        "model": "fake",
        "messages": messages,
        "max_tokens": 4,
        "logprobs": True,
        "top_logprobs": 2,
    }
    client = server.client()
    if stream:
        chunks = list(client.chat.completions.create(stream=True, **arguments))
        found = [c.logprobs for chunk in chunks for c in chunk.choices if c.logprobs]
    else:
        found = [client.chat.completions.create(**arguments).choices[0].logprobs]
    content = [entry for logprobs in found for entry in logprobs.content or []]
    assert [entry.token for entry in content] == ["<s>", "<|user|>", "\ufffd", "\ufffd"]
    assert [entry.logprob for entry in content] == [-1.0] * 4
    assert [bytes(entry.bytes or []) for entry in content] == [b"<s>", b"<|user|>", b"\xc3", b"\xa9"]
    assert [[top.logprob for top in entry.top_logprobs] for entry in content] == [[-0.5, -1.0]] * 4
    assert content[2].top_logprobs[1].token == content[2].token


def test_logprobs_without_top(server: LiveServer) -> None:
    answer = server.client().chat.completions.create(model="fake", messages=HELLO, max_tokens=1, logprobs=True)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].top_logprobs == []


def test_stop_token_ends_it(server: LiveServer) -> None:
    messages: list[Any] = [{"role": "user", "content": "<eos>"}]
    answer = server.client().chat.completions.create(model="fake", messages=messages)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == "<eos>"


def test_fields_without_effect_are_accepted(server: LiveServer) -> None:
    fields = {
        "user": "u",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "functions": None,
    }
    assert server.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1, **fields}).status_code == 200


def test_template_variables(server: LiveServer) -> None:
    body = {"messages": HELLO, "add_generation_prompt": False, "chat_template_kwargs": {"enable_thinking": False}}
    assert server.post("/tokenize", body).json()["count"] == 7
    answer = server.post("/v1/chat/completions", {**body, "max_tokens": 1})
    assert answer.json()["usage"]["prompt_tokens"] == 7
