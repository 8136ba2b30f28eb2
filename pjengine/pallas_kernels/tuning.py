"""Block sizes, splits and stages by measurement: a table per device kind beside the kernels' own heuristics.

`scripts/tune_kernels` writes the tables, `tuned/<device kind>.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, TypeVar

from pjengine.pallas_kernels.backends import Target
from pjengine.pallas_kernels.specs import AttentionSpec

TABLES = Path(__file__).parent / "tuned"

Config = TypeVar("Config")


def tuned(kernel: str, spec: AttentionSpec, target: Target, heuristic: Config, tables: Path = TABLES) -> Config:
    """The heuristic's dataclass, with the fields replaced that the device's table holds for this kernel and shape.

    Args:
      kernel: the name the table knows it by, such as "mosaic decode".
      heuristic: what serves a shape or a device that is not in the table.
    Raises:
      ValueError: the table names a field that the config lacks.
    """
    if target.device_kind is None:
        return heuristic
    path = tables / table_name(target.device_kind)
    row = _table(path).get((kernel, shape_key(spec)))
    if row is None:
        return heuristic
    unknown = row.keys() - {field.name for field in dataclasses.fields(heuristic)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"{path}: {kernel}: unknown fields {sorted(unknown)}; run scripts/tune_kernels again")
    return dataclasses.replace(heuristic, **row)  # type: ignore[type-var]


def shape_key(spec: AttentionSpec) -> str:
    """What a row of the table holds for: head size, query heads per KV head, page size and dtypes."""
    return f"{spec.head_dim}x{spec.group} page {spec.page_size or 0} {spec.dtype} {spec.kv_dtype}"


def table_name(device_kind: str) -> str:
    """File name of a device kind's table: "NVIDIA H200" has nvidia_h200.json."""
    return device_kind.lower().replace(" ", "_") + ".json"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A table's rows: kernel, shape, config (fields by name; none where the heuristic is the best that was tried) and
    the times they were found by. Empty where there is no table.
    """
    return json.loads(path.read_text())["rows"] if path.exists() else []


@functools.cache
def _table(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(kernel, shape) -> fields of its config."""
    return {(row["kernel"], row["shape"]): row["config"] for row in read_rows(path)}
