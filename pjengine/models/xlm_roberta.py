"""XLM-RoBERTa encoders (arXiv:1911.02116): bge-m3 (its dense vectors), multilingual-e5."""

from __future__ import annotations

from pjengine.models import roberta
from pjengine.models.encoder import cache_specs, forward, param_specs

__all__ = ["Config", "cache_specs", "forward", "param_specs"]


class Config(roberta.Config):
    """RoBERTa's encoder, unchanged, over a multilingual vocabulary."""
