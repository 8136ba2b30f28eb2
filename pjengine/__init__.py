"""pjengine: inference and serving of language and embedding models, in JAX and Pallas.

The public names are imported when first asked for, so that `import pjengine` is quick and imports no JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pjengine.config import EngineConfig
    from pjengine.errors import (
        ConfigError,
        EngineDead,
        EngineOverloaded,
        InvalidRequest,
        KernelUnavailable,
        ModelError,
        OutOfMemory,
        PJEngineError,
    )
    from pjengine.llm import LLM
    from pjengine.outputs import (
        ClassificationOutput,
        CompletionOutput,
        EmbeddingOutput,
        RankedDocument,
        RequestOutput,
    )
    from pjengine.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "ClassificationOutput",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingOutput",
    "EngineConfig",
    "EngineDead",
    "EngineOverloaded",
    "InvalidRequest",
    "KernelUnavailable",
    "ModelError",
    "OutOfMemory",
    "PJEngineError",
    "RankedDocument",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_HOMES = {
    "config": ("EngineConfig",),
    "errors": (
        "ConfigError",
        "EngineDead",
        "EngineOverloaded",
        "InvalidRequest",
        "KernelUnavailable",
        "ModelError",
        "OutOfMemory",
        "PJEngineError",
    ),
    "llm": ("LLM",),
    "outputs": ("ClassificationOutput", "CompletionOutput", "EmbeddingOutput", "RankedDocument", "RequestOutput"),
    "sampling_params": ("SamplingParams",),
}
_HOME = {name: f"pjengine.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pjengine' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
