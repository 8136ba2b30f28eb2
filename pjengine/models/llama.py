"""Llama 2, 3 and 3.1 (arXiv:2307.09288, 2407.21783) and what copies them, SmolLM2 among them."""

from __future__ import annotations

from typing import Self

from pjengine.models.decoder import DecoderConfig, cache_specs, classifier, forward, logits, param_specs
from pjengine.models.hf_config import HFConfig

__all__ = ["Config", "cache_specs", "classifier", "forward", "logits", "param_specs"]


class Config(DecoderConfig):
    """The shared decoder, as it is."""

    @classmethod
    def from_hf(cls, hf: HFConfig) -> Self:
        """Reads config.json; ModelError names a field that cannot be honoured."""
        bias = bool(hf.get("attention_bias"))
        return cls.read(hf, qkv_bias=bias, o_bias=bias, mlp_bias=bool(hf.get("mlp_bias")))
