"""Command-line flags made from the options' dataclasses, so that the two cannot differ."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer

from pjengine.config import BACKENDS, DTYPES, LOAD_FORMATS, PAGE_SIZES, TASKS, EngineConfig
from pjengine.errors import PJEngineError

_CHOICES: Mapping[str, tuple[object, ...]] = {
    "task": TASKS,
    "dtype": DTYPES,
    "load_format": LOAD_FORMATS,
    "attention_backend": BACKENDS,
    "page_size": PAGE_SIZES,
}
# Further names of a flag. Options are passed on by their first name's field.
_ALIASES: Mapping[str, tuple[str, ...]] = {"max_num_batched_tokens": ("--max-batch-tokens",)}


def attribute_docs(cls: type) -> dict[str, str]:
    """The lines `name: meaning` of a class's docstring, continuation lines joined."""
    docs: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        if found := re.match(r" {2}(\w+(?:, \w+)*): (.*)", line):
            names = found[1].split(", ")
            docs |= dict.fromkeys(names, found[2])
        elif line.startswith("    ") and names:
            docs |= {name: f"{docs[name]} {line.strip()}" for name in names}
        else:
            names = []
    return docs


def flag(name: str, kind: Any) -> str:
    """A field's flag: `max_model_len` is `--max-model-len`; a bool has its `--no-` form too."""
    dashed = name.replace("_", "-")
    return f"--{dashed}/--no-{dashed}" if kind is bool else f"--{dashed}"


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that takes `model` and `config: EngineConfig` one flag per field of it in place of `config`.

    A PJEngineError ends the command with its message and exit code 1: a traceback would hide what the user can mend.
    """
    fields = [field for field in dataclasses.fields(EngineConfig) if field.name != "model"]

    @functools.wraps(command)
    def with_config(model: str, **arguments: Any) -> None:
        with reported_errors():
            config = EngineConfig(model=model, **{field.name: arguments.pop(field.name) for field in fields})
            command(model=model, config=config, **arguments)

    signature = inspect.signature(command, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.name != "config"]
    with_config.__signature__ = signature.replace(parameters=parameters + _parameters(fields))  # type: ignore[attr-defined]
    return with_config


def _parameters(fields: list[dataclasses.Field[Any]]) -> list[inspect.Parameter]:
    kinds, docs = typing.get_type_hints(EngineConfig), attribute_docs(EngineConfig)
    parameters = []
    for field in fields:
        choices = _CHOICES.get(field.name)
        option = typer.Option(
            flag(field.name, kinds[field.name]),
            *_ALIASES.get(field.name, ()),
            help=_sentence(docs.get(field.name, "")),
            metavar="|".join(map(str, choices)) if choices else None,
            rich_help_panel="Engine",
            show_default=field.default is not None,
        )
        annotation: Any = typing.Annotated.__class_getitem__((kinds[field.name], option))  # type: ignore[attr-defined]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)
        )
    return parameters


def _sentence(doc: str) -> str:
    return (doc[:1].upper() + doc[1:]).replace("None:", "by default")


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """A PJEngineError inside is printed in one line and ends the program with code 1."""
    try:
        yield
    except PJEngineError as error:
        print(f"pjengine: error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
