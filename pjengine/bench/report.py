"""How results are shown and kept: a table on the terminal, JSON with versions, device and config."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

import pjengine
from pjengine.config import EngineConfig
from pjengine.errors import ConfigError

if TYPE_CHECKING:
    from pjengine.bench.roofline import Roofline


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows of equal keys as a table; a single row as a list, which fits any terminal. Lists are left out."""
    rows = [{name: value for name, value in row.items() if not isinstance(value, list)} for row in rows]
    names = [name.replace("_", " ") for name in rows[0]]
    table = Table(title=title, show_header=len(rows) > 1)
    if len(rows) == 1:
        table.add_column()
        table.add_column(justify="right")
        for name, value in zip(names, rows[0].values(), strict=True):
            table.add_row(name, _shown(value))
    else:
        for name in names:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*map(_shown, row.values()))
    Console().print(table)


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"


def save(
    path: str,
    benchmark: str,
    device: str,
    roofline: Roofline,
    config: EngineConfig,
    options: dict[str, Any],
    rows: Sequence[dict[str, Any]],
) -> None:
    """Writes everything a reader needs to judge or repeat an engine's figures.

    Args:
      device: its kind, as JAX names it.
      options: of the benchmark, beside the engine's.
    """
    document = {
        "device": device,
        "roofline": dataclasses.asdict(roofline),
        "config": dataclasses.asdict(config),
        "options": options,
        "rows": list(rows),
    }
    write(path, benchmark, document)


def check_writable(path: str | None, option: str = "json") -> None:
    """Before the time is spent. path: of a file to come, as `option` names it; None: of none.

    Raises: ConfigError if it cannot be written.
    """
    if path is None:
        return
    file = Path(path)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{option}: {path} cannot be written; name a file in a folder that exists")


def write(path: str, benchmark: str, document: dict[str, Any]) -> None:
    """A benchmark's JSON file: its name, the versions, and the rest.

    Raises: ConfigError if the file cannot be written.
    """
    versions = {"pjengine": pjengine.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    head = {"benchmark": benchmark, "versions": versions}
    try:
        Path(path).write_text(json.dumps(head | document, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"json: {path} cannot be written ({error.strerror})") from error
