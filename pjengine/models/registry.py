"""The model types pjengine knows: one row here, one module of that name (dashes as underscores)."""

from __future__ import annotations

import importlib
from types import ModuleType

from pjengine.errors import ModelError

MODEL_TYPES = (
    "bert",
    "distilbert",
    "gemma3_text",
    "gte",
    "llama",
    "mistral",
    "modernbert",
    "mpnet",
    "new",
    "nomic_bert",
    "qwen2",
    "qwen3",
    "roberta",
    "xlm-roberta",
)


def get(model_type: str) -> ModuleType:
    """The model module of a Hugging Face `model_type`; ModelError lists the known ones."""
    if model_type not in MODEL_TYPES:
        raise ModelError(f"model_type: {model_type!r} is not supported; known are {', '.join(MODEL_TYPES)}")
    return importlib.import_module(f"pjengine.models.{model_type.replace('-', '_')}")
