"""RoBERTa encoders (arXiv:1907.11692): all-distilroberta, simcse and other sentence embedders."""

from __future__ import annotations

from typing import Self

from pjengine.models.encoder import EncoderConfig, cache_specs, forward, param_specs, params_for_few
from pjengine.models.heads import Dense, Head, class_head, class_labels
from pjengine.models.hf_config import HFConfig, required

__all__ = ["Config", "cache_specs", "classifier", "forward", "param_specs", "params_for_few"]


class Config(EncoderConfig):
    """BERT's encoder with positions counted from pad_token_id + 1, as fairseq counted them.

    A padding token inside a text takes a position like any other token; transformers skips it.
    """

    @classmethod
    def from_hf(cls, hf: HFConfig) -> Self:
        """Reads config.json; ModelError names a field that cannot be honoured."""
        pad = int(required({"pad_token_id": 1, **hf}, "pad_token_id"))
        return cls.read(hf, position_offset=pad + 1)


def classifier(hf: HFConfig) -> Head:
    """The head of RobertaForSequenceClassification and its XLM twin: bge-reranker and other cross-encoders."""
    size = Config.from_hf(hf).hidden_size
    dense = Dense("classifier.dense", size, size, "tanh")
    return class_head(hf, "cls", dense, Dense("classifier.out_proj", size, len(class_labels(hf))))
