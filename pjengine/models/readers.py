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
