"""Chat templates render as in transformers, and fail as bad requests."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from pjengine.chat_template import ChatTemplate
from pjengine.errors import InvalidRequest

USER = {"role": "user", "content": "Hi"}


def render(source: str, messages: list[Any] | None = None, **options: Any) -> str:
    template = ChatTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"})
    return template.render([USER] if messages is None else messages, **options)


def test_variables() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ messages[0]['role'] }}{{ eos_token }}"
    source += "|{{ add_generation_prompt }}|{{ x }}"
    assert render(source) == "<s>Hiuser</s>|True|"
    assert render(source, add_generation_prompt=False, x=1) == "<s>Hiuser</s>|False|1"


def test_blocks_leave_no_blank_lines() -> None:
    source = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\nend"
    assert render(source) == "Hi\nend"


def test_loop_controls() -> None:
    source = "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
    source += "{{ m.content }}{% break %}{% endfor %}"
    assert render(source, [{"role": "tool", "content": "x"}, USER, USER]) == "Hi"


def test_tojson_keeps_html_and_unicode() -> None:
    assert render("{{ x | tojson }}", x={"a": "<é&'>"}) == '{"a": "<é&\'>"}'
    assert render("{{ x | tojson(indent=1) }}", x=[1]) == "[\n 1\n]"


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


def test_generation_blocks_are_transparent() -> None:
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "aHib"


def test_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    source = "{% if tools %}{{ tools[0].function.name }}{% else %}none{% endif %}"
    assert render(source, tools=tools) == "f"
    assert render(source) == "none"
    both = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert (both.render([USER]), both.render([USER], tools=tools)) == ("plain", "tools")


def test_content_in_text_parts() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render("{{ messages[0]['content'] + '!' }}", [{"role": "user", "content": parts}]) == "one\ntwo!"


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, "text", {"type": "text", "text": 1}]
)
def test_content_parts_that_are_no_text(part: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"messages: message 1: content: only parts of type 'text'"):
        render("{{ messages }}", [USER, {"role": "user", "content": [part]}])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses them: roles must alternate"),
        ("{{ messages[0].content + messages[0].missing }}", "refuses them"),
        ("{{ messages[7].content.strip() }}", "refuses them"),
        ("{{ 1 // 0 }}", "refuses them"),
        ("{% for %}", r"is broken \(line 1"),
        ("{{ ''.__class__.__mro__ }}", "refuses them.*unsafe"),
        ("{{ messages.append(1) }}", "refuses them.*unsafe"),
        ("{% for i in range(10000000) %}x{% endfor %}", "refuses them: Range too big"),
    ],
)
def test_failures_are_bad_requests(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"messages: the model's chat template {reason}") as caught:
        render(source)
    assert (caught.value.field, caught.value.code) == ("messages", "chat_template_error")


def test_messages_that_are_no_objects() -> None:
    with pytest.raises(InvalidRequest, match="messages: message 1: expected an object with role and content, got 'Hi'"):
        render("{{ messages }}", [USER, "Hi"])


def test_only_named_templates() -> None:
    with pytest.raises(InvalidRequest, match="chat templates rag but no default one"):
        ChatTemplate({"rag": "x"}, {}).render([USER])
