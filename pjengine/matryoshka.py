"""Shorter embeddings from the front of longer ones (Matryoshka Representation Learning, arXiv:2205.13147)."""

from __future__ import annotations

import numpy as np

from pjengine.engine_info import EngineInfo
from pjengine.errors import InvalidRequest
from pjengine.request_checks import is_integer


def check_dimensions(dimensions: int | None, info: EngineInfo) -> None:
    """Raises InvalidRequest unless the model's embeddings have that many elements; None, all of them, always works."""
    if dimensions is not None and not (is_integer(dimensions) and 1 <= dimensions <= info.embedding_size):
        raise InvalidRequest(
            f"dimensions: {dimensions!r}, but the embeddings of {info.model} have {info.embedding_size} elements; "
            f"ask for 1 to {info.embedding_size}",
            field="dimensions",
        )


def shorten(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first `dimensions` elements of each vector, scaled to length 1; None: the vectors as they are.

    Args:
      vectors: float32 [n, embedding_size].
    Returns: float32 [n, dimensions], contiguous.
    """
    if dimensions is None:
        return vectors
    cut = vectors[:, :dimensions]
    return cut / np.maximum(np.linalg.norm(cut, axis=-1, keepdims=True), 1e-12)
