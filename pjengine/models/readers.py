"""What loading needs from a checkpoint, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class TensorReader(Protocol):
    """Tensors of a checkpoint under their Hugging Face names. `read` may be called from several threads."""

    @property
    def where(self) -> str:
        """The file or directory, for error messages."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor, as stored ([out, in] for matrices)."""

    def read(self, name: str) -> np.ndarray:
        """One tensor in host memory, in the checkpoint's dtype (quantised ones as float32)."""


class Joined:
    """Several checkpoints as one: those of a part "2_Dense" are `2_Dense.…`, those of the part "" keep their names."""

    def __init__(self, parts: Mapping[str, TensorReader]):
        self._places = {
            f"{part}.{name}" if part else name: (reader, name)
            for part, reader in parts.items()
            for name in reader.shapes
        }
        self.where = next(iter(parts.values())).where
        self.shapes = {name: reader.shapes[stored] for name, (reader, stored) in self._places.items()}

    def read(self, name: str) -> np.ndarray:
        reader, stored = self._places[name]
        return reader.read(stored)
