"""BERT encoders (arXiv:1810.04805): MiniLM, BGE, E5 and other sentence embedders; cross-encoders."""

from __future__ import annotations

from typing import Self

from pjengine.models.encoder import EncoderConfig, cache_specs, forward, param_specs, params_for_few
from pjengine.models.heads import Dense, Head, class_head, class_labels
from pjengine.models.hf_config import HFConfig

__all__ = ["Config", "cache_specs", "classifier", "forward", "param_specs", "params_for_few"]


class Config(EncoderConfig):
    """The post-norm encoder with learned positions from 0 and token types."""

    @classmethod
    def from_hf(cls, hf: HFConfig) -> Self:
        """Reads config.json; ModelError names a field that cannot be honoured."""
        return cls.read(hf)


def classifier(hf: HFConfig) -> Head:
    """The head of BertForSequenceClassification: cross-encoders such as ms-marco-MiniLM, and classifiers."""
    size = Config.from_hf(hf).hidden_size
    pooler = Dense("bert.pooler.dense", size, size, "tanh")
    return class_head(hf, "cls", pooler, Dense("classifier", size, len(class_labels(hf))))
