"""Qwen2 and Qwen2.5 (arXiv:2407.10671)."""

from __future__ import annotations

from typing import Self

from pjengine.models.decoder import DecoderConfig, cache_specs, classifier, forward, logits, param_specs
from pjengine.models.hf_config import HFConfig, layer_windows

__all__ = ["Config", "cache_specs", "classifier", "forward", "logits", "param_specs"]


class Config(DecoderConfig):
    """Llama's decoder with a bias on Q, K and V and, where asked for, a window on the upper layers."""

    @classmethod
    def from_hf(cls, hf: HFConfig) -> Self:
        """Reads config.json; ModelError names a field that cannot be honoured."""
        return cls.read(hf, windows=layer_windows(hf), qkv_bias=True)
