"""Embeddings as an Arrow column."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from pjengine.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow


def require_pyarrow() -> ModuleType:
    """pyarrow. Raises: ConfigError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("output: Parquet needs the package pyarrow; pip install 'pjengine[bulk]'") from None
    return pyarrow


def vector_column(vectors: np.ndarray) -> pyarrow.Array:
    """float32 [rows, elements] as a fixed-size list of float32 per row; the numbers are not copied."""
    pa = require_pyarrow()
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), vectors.shape[1])
