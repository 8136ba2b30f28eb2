"""Safetensors checkpoints: one file, or shards listed by model.safetensors.index.json.

Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from pjengine.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float64}


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
    kinds = collections.Counter(stored.dtype for stored in _stored_tensors(weight_files(directory)).values())
    kind = kinds.most_common(1)[0][0] if kinds else "no tensors"
    return np.dtype(_DTYPES[kind]).name if kind in _DTYPES else kind


class SafetensorsFiles:
    """A TensorReader over a directory's safetensors files."""

    def __init__(self, directory: Path):
        files = weight_files(directory)
        if not files:
            raise ModelError(
                f"{directory}: no .safetensors file; PyTorch .bin checkpoints must be converted to safetensors first"
            )
        self.where = str(directory)
        self._stored = _stored_tensors(files)
        self.shapes = {name: stored.shape for name, stored in self._stored.items()}
        index = directory / INDEX
        if index.is_file():
            absent = sorted(_weight_map(index).keys() - self.shapes.keys())
            if absent:
                raise ModelError(
                    f"{index}: lists tensors that its shards do not hold: {_some(absent)}; fetch the shards again"
                )

    def read(self, name: str) -> np.ndarray:
        stored = self._stored[name]
        if stored.dtype not in _DTYPES:
            raise ModelError(f"{stored.path}: tensor {name}: dtype {stored.dtype} is not one of {', '.join(_DTYPES)}")
        # The library's get_tensor copies twice and holds the GIL; this is 2.5 times faster.
        flat = np.fromfile(stored.path, _DTYPES[stored.dtype], math.prod(stored.shape), offset=stored.offset)
        return flat.reshape(stored.shape)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where one tensor lies: `offset` counts from the start of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def _stored_tensors(files: list[Path]) -> dict[str, _Stored]:
    found: dict[str, _Stored] = {}
    for path in files:
        try:
            with safe_open(path, framework="np"):  # refuses headers and lengths that are not as the format says
                pass
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path}: not a readable safetensors file ({error}); it is damaged or truncated: fetch it again"
            ) from error
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, _ = entry["data_offsets"]
            found[name] = _Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin)
    return found


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index}: not a safetensors index with a weight_map ({error!r}); fetch it again") from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(
            f"{index}: weight_map: expected an object of tensor name to file name, got {type(weight_map).__name__}"
        )
    return weight_map


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
