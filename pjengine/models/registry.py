"""The model types pjengine knows: one row here, one module `pjengine.models.<model_type>`."""

from __future__ import annotations

import importlib
from types import ModuleType

from pjengine.errors import ModelError

MODEL_TYPES = ("bert", "llama", "mistral", "qwen2", "qwen3")


def get(model_type: str) -> ModuleType:
    """The model module of a Hugging Face `model_type`; ModelError lists the known ones."""
    if model_type not in MODEL_TYPES:
        raise ModelError(f"model_type: {model_type!r} is not supported; known are {', '.join(MODEL_TYPES)}")
    return importlib.import_module(f"pjengine.models.{model_type}")
