"""Safetensors checkpoints: one file, or shards listed by model.safetensors.index.json."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pjengine.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, if any; ModelError where a shard that its index names is missing."""
    index = directory / INDEX
    if not index.is_file():
        single = directory / SINGLE
        return [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    files = sorted(set(_weight_map(index).values()))
    missing = [f for f in files if not (directory / f).is_file()]
    if missing:
        raise ModelError(
            f"{index}: {len(missing)} of {len(files)} shards are missing: {_some(missing)}; fetch them again"
        )
    return [directory / f for f in files]


def stored_dtype(directory: Path) -> str:
    """The dtype of most of a checkpoint's tensors: "float32", "bfloat16", "float16" or as safetensors spells it."""
    kinds = collections.Counter(
        file.get_slice(name).get_dtype()
        for file in map(_open, weight_files(directory))
        for name in file.keys()  # noqa: SIM118
    )
    kind = kinds.most_common(1)[0][0] if kinds else "no tensors"
    return _DTYPES.get(kind, kind)


class SafetensorsFiles:
    """A TensorReader over a directory's safetensors files."""

    def __init__(self, directory: Path):
        files = weight_files(directory)
        if not files:
            raise ModelError(
                f"{directory}: no .safetensors file; PyTorch .bin checkpoints must be converted to safetensors first"
            )
        self.where = str(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Any] = {}
        for path in files:
            file = _open(path)
            for name in file.keys():  # noqa: SIM118 (no mapping: safe_open has keys() alone)
                self.shapes[name] = tuple(file.get_slice(name).get_shape())
                self._file_of[name] = file
        index = directory / INDEX
        if index.is_file():
            absent = sorted(_weight_map(index).keys() - self.shapes.keys())
            if absent:
                raise ModelError(
                    f"{index}: lists tensors that its shards do not hold: {_some(absent)}; fetch the shards again"
                )

    def read(self, name: str) -> np.ndarray:
        return self._file_of[name].get_tensor(name)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: not a readable safetensors file ({error}); it is damaged or truncated: fetch it again"
        ) from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index}: not a safetensors index with a weight_map ({error!r}); fetch it again") from error
    if not isinstance(weight_map, dict):
        raise ModelError(
            f"{index}: weight_map: expected an object of tensor name to file name, got {type(weight_map).__name__}"
        )
    return weight_map


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
