"""Reads the header of a GGUF file: metadata and where each tensor lies.

The gguf library's own reader makes a NumPy view of every string of the vocabulary, about a second for 49,000 tokens in
every process that starts; this one takes 0.05 s and names what is wrong with a damaged file. Dequantisation stays the
library's.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from pjengine.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 8


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
      shape: row-major, [out, in] for a matrix (the file lists dimensions in reverse).
      ggml_type: value of gguf.GGMLQuantizationType.
      offset: of its first byte, from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """Metadata (str, int, float, bool and lists of those) and tensors of one file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def require(self, key: str) -> Any:
        """Metadata value of `key`; ModelError where the file has none."""
        if key not in self.metadata:
            raise ModelError(
                f"{self.path}: GGUF metadata has no {key!r}; convert the model again with a current converter"
            )
        return self.metadata[key]


def read_header(path: Path) -> GGUFHeader:
    """Header of a GGUF file; ModelError where it is not one, truncated, or its tensors reach past its end."""
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ModelError(f"{path}: not a GGUF file (it does not start with {MAGIC!r})")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(path, data).header()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, RecursionError) as error:
        raise ModelError(f"{path}: damaged or truncated GGUF header ({error}); fetch the file again") from error


def read_tensor(header: GGUFHeader, info: TensorInfo) -> np.ndarray:
    """One tensor, dequantised: float32 (float16, bfloat16 and float64 as stored), of `info.shape`."""
    import ml_dtypes
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(info.ggml_type)
    plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": ml_dtypes.bfloat16}.get(kind.name)
    if plain is not None:
        return np.fromfile(header.path, plain, math.prod(info.shape), offset=info.offset).reshape(info.shape)
    block, size = GGML_QUANT_SIZES[kind]
    *rows, columns = info.shape
    packed = np.fromfile(header.path, np.uint8, math.prod(rows) * columns // block * size, offset=info.offset)
    try:
        return dequantize(packed.reshape(*rows, columns // block * size), kind)
    except NotImplementedError as error:
        raise ModelError(
            f"{header.path}: tensor {info.name}: type {kind.name} cannot be dequantised; use another quantisation"
        ) from error


class _Cursor:
    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.at = len(MAGIC)

    def header(self) -> GGUFHeader:
        version = self.scalar("I")
        if version not in VERSIONS:
            raise ModelError(f"{self.path}: GGUF version {version}; versions {VERSIONS} (little-endian) can be read")
        tensor_count, metadata_count = self.scalar("Q"), self.scalar("Q")
        metadata = {self.string(): self.value(self.scalar("I")) for _ in range(metadata_count)}
        infos = [self.tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelError(f"{self.path}: general.alignment: expected a positive integer, got {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors = {i.name: dataclasses.replace(i, offset=start + i.offset) for i in infos}
        for info in tensors.values():
            self.check(info)
        return GGUFHeader(self.path, metadata, tensors)

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        (length,) = struct.unpack_from("<Q", self.data, self.at)
        begin = self.at + 8
        self.at = begin + length
        if self.at > len(self.data):
            raise struct.error(f"a string of {length} bytes at offset {begin} reaches past the end")
        return self.data[begin : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise struct.error(f"unknown value type {kind} at offset {self.at}")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind, length = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            code = f"<{length}{_SCALARS[kind]}"
            values = struct.unpack_from(code, self.data, self.at)
            self.at += struct.calcsize(code)
            return list(values)
        if kind == _STRING:
            return self.strings(length)
        return [self.value(kind) for _ in range(length)]

    def strings(self, count: int) -> list[str]:
        """As `count` calls of string(), three times faster: vocabularies are most of a header."""
        length_at, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        out = []
        for _ in range(count):
            (length,) = length_at(data, at)
            at += 8 + length
            out.append(str(data[at - length : at], "utf-8"))
        if at > len(data):
            raise struct.error(f"an array of {count} strings at offset {self.at} reaches past the end")
        self.at = at
        return out

    def tensor_info(self) -> TensorInfo:
        name, dims = self.string(), self.scalar("I")
        if dims > _MAX_DIMS:
            raise struct.error(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dims))[::-1]
        return TensorInfo(name, shape, self.scalar("I"), self.scalar("Q"))

    def check(self, info: TensorInfo) -> None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(info.ggml_type)]
        except ValueError as error:
            raise ModelError(
                f"{self.path}: tensor {info.name}: unknown GGML type {info.ggml_type}; update gguf"
            ) from error
        elements = math.prod(info.shape)
        if not info.shape or info.shape[-1] % block:
            raise ModelError(
                f"{self.path}: tensor {info.name}: shape {info.shape} does not hold whole blocks of {block}"
            )
        end = info.offset + elements // block * size
        if end > len(self.data):
            raise ModelError(
                f"{self.path}: truncated: {info.name} ends at byte {end} of {len(self.data)}; fetch the file again"
            )
