"""Qwen3, dense (arXiv:2505.09388)."""

from __future__ import annotations

from typing import Self

from pjengine.models.decoder import DecoderConfig, cache_specs, classifier, forward, logits, param_specs
from pjengine.models.hf_config import HFConfig, layer_windows

__all__ = ["Config", "cache_specs", "classifier", "forward", "logits", "param_specs"]


class Config(DecoderConfig):
    """Llama's decoder with query and key heads normalised and a head_dim of its own."""

    @classmethod
    def from_hf(cls, hf: HFConfig) -> Self:
        """Reads config.json; ModelError names a field that cannot be honoured."""
        bias = bool(hf.get("attention_bias"))
        return cls.read({"head_dim": 128, **hf}, windows=layer_windows(hf), qkv_bias=bias, o_bias=bias, qk_norm=True)
