"""What loading needs from a checkpoint, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class TensorReader(Protocol):
    """Tensors of a checkpoint under their Hugging Face names. `read` may be called from several threads.

    Attributes:
      where: the file or directory, for error messages.
      shapes: of every tensor, as stored ([out, in] for matrices).
    """

    where: str
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """One tensor in host memory, in the checkpoint's dtype (quantised ones as float32)."""
        ...
