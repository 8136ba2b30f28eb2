"""Mistral 7B and its successors (arXiv:2310.06825)."""

from __future__ import annotations

from typing import Self

from pjengine.models.decoder import DecoderConfig, cache_specs, classifier, forward, logits, param_specs
from pjengine.models.hf_config import HFConfig, allow, required

__all__ = ["Config", "cache_specs", "classifier", "forward", "logits", "param_specs"]


class Config(DecoderConfig):
    """Llama's decoder with one sliding window for all layers, or none."""

    @classmethod
    def from_hf(cls, hf: HFConfig) -> Self:
        """Reads config.json; ModelError names a field that cannot be honoured."""
        allow(hf, "layer_types", None)
        window = hf.get("sliding_window", 4096)  # the first Mistral's, where the file is silent; null: none
        return cls.read(hf, windows=(window,) * int(required(hf, "num_hidden_layers")))
