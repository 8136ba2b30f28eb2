"""GTE as its authors named it: `model_type` "new" (Alibaba-NLP/new-impl)."""

from __future__ import annotations

from pjengine.models import gte
from pjengine.models.gte import cache_specs, classifier, forward, param_specs

__all__ = ["Config", "cache_specs", "classifier", "forward", "param_specs"]


class Config(gte.Config):
    """GTE's."""
