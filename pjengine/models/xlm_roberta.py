"""XLM-RoBERTa encoders (arXiv:1911.02116): bge-m3 (its dense vectors), multilingual-e5; bge-reranker."""

from __future__ import annotations

from pjengine.models import roberta
from pjengine.models.roberta import cache_specs, classifier, forward, param_specs, params_for_few

__all__ = ["Config", "cache_specs", "classifier", "forward", "param_specs", "params_for_few"]


class Config(roberta.Config):
    """RoBERTa's encoder, unchanged, over a multilingual vocabulary."""
