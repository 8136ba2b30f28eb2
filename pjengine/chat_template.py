"""Chat templates: from a list of messages to the prompt a model was trained on, as transformers' `apply_chat_template`.

Templates come with models and are not trusted: they run in jinja2's immutable sandbox.
Reference: https://huggingface.co/docs/transformers/chat_templating.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pjengine.errors import InvalidRequest

Message = Mapping[str, Any]


class ChatTemplate:
    """A model's chat template or templates. Thread-safe.

    Args:
      templates: jinja source by name; "default" is used, or "tool_use" where a request brings tools.
      special_tokens: variables every template sees: bos_token, eos_token, ….
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]):
        self.templates = dict(templates)
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation; it holds the special tokens as text, so encode it without adding any.

        Args:
          messages: {"role": …, "content": …} each; a content that is a list of text parts is joined with line breaks.
          add_generation_prompt: end where the assistant's answer begins.
          tools: JSON schemas of functions the model may call.
          **variables: further variables of the template, such as `enable_thinking`.
        Raises:
          InvalidRequest: the template refuses the messages, or the model has none for this use.
        """
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise _invalid(f"the model has chat templates {', '.join(self.templates)} but no default one")
        scope = {
            **self._special_tokens,
            **variables,
            "messages": [_with_plain_content(i, message) for i, message in enumerate(messages)],
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _compile(self.templates[name]).render(scope)
        except jinja2.TemplateSyntaxError as error:
            raise _invalid(f"the model's chat template is broken (line {error.lineno}: {error})") from error
        except Exception as error:  # a template may fail in any way Python can, on messages its author did not think of
            raise _invalid(f"the model's chat template refuses them: {error}") from error


def _with_plain_content(index: int, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise _invalid(f"message {index}: expected an object with role and content, got {message!r:.80}")
    content = message.get("content")
    if not isinstance(content, list):
        return message
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _invalid(f"message {index}: content: only parts of type 'text' are supported, got {part!r:.80}")
    return {**message, "content": "\n".join(part["text"] for part in content)}


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike jinja2's own filter it does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _invalid(reason: str) -> InvalidRequest:
    return InvalidRequest(f"messages: {reason}", field="messages", code="chat_template_error")
