"""/v1/completions through the openai client, on the fake engine: it repeats the prompt, one byte a token."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving.fake_engine import make_tokenizer
from tests.serving.live_server import LiveServer


def test_whole(server: LiveServer) -> None:
    answer = server.client().completions.create(
        model="fake", prompt="ab ", max_tokens=7, extra_body={"add_special_tokens": False}
    )
    assert answer.object == "text_completion"
    assert answer.model == "fake"
    assert [c.text for c in answer.choices] == ["ab ab a"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 7, 10)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


def test_max_tokens_is_16_by_default(server: LiveServer) -> None:
    answer = server.client().completions.create(model="fake", prompt="x")
    assert answer.choices[0].text == "x" * 16


def test_default_max_tokens_gives_way_to_the_window(server: LiveServer) -> None:
    answer = server.client().completions.create(model="fake", prompt="x" * 510)
    assert answer.choices[0].text == "xx"


def test_streamed_with_usage(server: LiveServer) -> None:
    chunks = list(
        server.client().completions.create(
            model="fake", prompt="ab ", max_tokens=40, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == ("ab " * 14)[:40]
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 40
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abca", "bcab"]),
        (["ab", "cd"], ["abab", "baba", "cdcd", "dcdc"]),
        ([97, 98], ["abab", "baba"]),
        ([[97, 98], [99]], ["abab", "baba", "cccc", "cccc"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_prompt_forms_and_n(server: LiveServer, prompt: Any, texts: list[str], stream: bool) -> None:
    """Choices are numbered prompt by prompt; the fake engine's second of a prompt starts one token later."""
    found = dict.fromkeys(range(len(texts)), "")
    if stream:
        for chunk in server.client().completions.create(model="fake", prompt=prompt, max_tokens=4, n=2, stream=True):
            for choice in chunk.choices:
                found[choice.index] += choice.text
    else:
        answer = server.client().completions.create(model="fake", prompt=prompt, max_tokens=4, n=2)
        found = {choice.index: choice.text for choice in answer.choices}
    assert list(found.values()) == texts


def test_stop_string_ends_the_text_and_the_sequence(server: LiveServer) -> None:
    answer = server.client().completions.create(model="fake", prompt="one two ", max_tokens=400, stop=["o on"])
    choice = answer.choices[0]
    assert choice.text == "one tw"
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == "o on"  # type: ignore[attr-defined]
    assert answer.usage is not None
    assert answer.usage.completion_tokens < 100
    server.wait_idle()


def test_stop_string_is_never_streamed(server: LiveServer) -> None:
    stream = server.client().completions.create(
        model="fake", prompt="one two ", max_tokens=400, stop="o on", stream=True
    )
    chunks = [choice for chunk in stream for choice in chunk.choices]
    assert "".join(c.text for c in chunks) == "one tw"
    assert chunks[-1].finish_reason == "stop"


def test_include_stop_string(server: LiveServer) -> None:
    answer = server.client().completions.create(
        model="fake", prompt="one two ", max_tokens=400, stop="two", extra_body={"include_stop_str_in_output": True}
    )
    assert answer.choices[0].text == "one two"


def test_eos_is_no_part_of_the_text(server: LiveServer) -> None:
    answer = server.client().completions.create(model="fake", prompt="a<eos>", max_tokens=100)
    assert answer.choices[0].text == "a<eos>"
    assert answer.choices[0].finish_reason == "stop"


def test_ignore_eos_and_stop_token_ids(server: LiveServer) -> None:
    ids = make_tokenizer().encode("a<eos>b", add_special_tokens=False)
    answer = server.client().completions.create(
        model="fake", prompt=ids, max_tokens=100, extra_body={"ignore_eos": True, "stop_token_ids": [ids[-1]]}
    )
    assert answer.choices[0].text == "a<eos>"
    assert answer.choices[0].stop_reason == ids[-1]  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [False, True])
def test_characters_of_several_tokens(server: LiveServer, stream: bool) -> None:
    text = "日本語🙂"
    if stream:
        chunks = server.client().completions.create(model="fake", prompt=text, max_tokens=26, stream=True)
        found = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    else:
        found = server.client().completions.create(model="fake", prompt=text, max_tokens=26).choices[0].text
    assert found == text + text


@pytest.mark.parametrize("stream", [False, True])
def test_legacy_logprobs_with_echo(server: LiveServer, stream: bool) -> None:
    client = server.client()
    if stream:
        chunks = list(
            client.completions.create(model="fake", prompt="abc", max_tokens=2, echo=True, logprobs=1, stream=True)
        )
        choices = [choice for chunk in chunks for choice in chunk.choices]
    else:
        choices = client.completions.create(model="fake", prompt="abc", max_tokens=2, echo=True, logprobs=1).choices
    found = [choice.logprobs for choice in choices if choice.logprobs]
    assert "".join(choice.text for choice in choices) == "abcab"
    assert [t for l in found for t in l.tokens or []] == list("abcab")  # noqa: E741
    assert [t for l in found for t in l.text_offset or []] == [0, 1, 2, 3, 4]  # noqa: E741
    assert [t for l in found for t in l.token_logprobs or []] == [None, -1.0, -1.0, -1.0, -1.0]  # noqa: E741
    # The one most likely token, and the chosen one.
    assert [t for l in found for t in l.top_logprobs or []] == [  # noqa: E741
        None,
        {"c": -0.5, "b": -1.0},
        {"d": -0.5, "c": -1.0},
        {"b": -0.5, "a": -1.0},
        {"c": -0.5, "b": -1.0},
    ]


def test_logprobs_0_has_the_chosen_token(server: LiveServer) -> None:
    answer = server.client().completions.create(model="fake", prompt="ab", max_tokens=1, logprobs=0)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.top_logprobs == [{"a": -1.0}]


def test_echo_of_token_ids(server: LiveServer) -> None:
    answer = server.client().completions.create(model="fake", prompt=[97, 98], max_tokens=1, echo=True)
    assert answer.choices[0].text == "aba"


def test_scoring_a_prompt_without_generating(server: LiveServer) -> None:
    answer = server.client().completions.create(model="fake", prompt="abc", max_tokens=0, echo=True, logprobs=1)
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs == [None, -1.0, -1.0]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_prompt_logprobs_as_in_vllm(server: LiveServer) -> None:
    body = {"prompt": "ab", "max_tokens": 1, "prompt_logprobs": 1}
    found = server.post("/v1/completions", body).json()["choices"][0]["prompt_logprobs"]
    assert found == [
        None,
        {
            "99": {"logprob": -0.5, "rank": 1, "decoded_token": "c"},
            "98": {"logprob": -1.0, "rank": 2, "decoded_token": "b"},
        },
    ]


def test_fields_without_effect_are_accepted(server: LiveServer) -> None:
    body = {
        "prompt": "a",
        "user": "u",
        "best_of": 1,
        "seed": 3,
        "suffix": None,
        "logit_bias": {"97": 1.5},
        "priority": -3,
    }
    assert server.post("/v1/completions", body).status_code == 200
