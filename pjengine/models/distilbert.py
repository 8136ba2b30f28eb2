"""DistilBERT encoders (arXiv:1910.01108): msmarco-distilbert, multi-qa-distilbert and other sentence embedders."""

from __future__ import annotations

from typing import Any, Self

from pjengine.errors import ModelError
from pjengine.models import encoder
from pjengine.models.encoder import EncoderConfig, LayerNames, cache_specs, forward, params_for_few
from pjengine.models.heads import Dense, Head, class_head, class_labels
from pjengine.models.hf_config import HFConfig, allow, required

__all__ = ["Config", "cache_specs", "classifier", "forward", "param_specs", "params_for_few"]

_NAMES = LayerNames(
    layers="transformer.layer",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    o="attention.out_lin",
    attn_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    mlp_norm="output_layer_norm",
)


class Config(EncoderConfig):
    """BERT's encoder without token types, under names of its own."""

    @classmethod
    def from_hf(cls, hf: HFConfig) -> Self:
        """Reads config.json; ModelError names a field that cannot be honoured."""
        allow(hf, "activation", "gelu")
        allow(hf, "quantization_config", None)
        size, num_heads = int(required(hf, "dim")), int(required(hf, "n_heads"))
        if size % num_heads:
            raise ModelError(f"dim: {size} is not a multiple of n_heads {num_heads}")
        return cls(
            vocab_size=int(required(hf, "vocab_size")),
            hidden_size=size,
            num_layers=int(required(hf, "n_layers")),
            max_position_embeddings=int(required(hf, "max_position_embeddings")),
            num_heads=num_heads,
            mlp_size=int(required(hf, "hidden_dim")),
            type_vocab_size=0,
            layer_norm_eps=1e-12,
        )


def param_specs(config: EncoderConfig) -> dict[str, Any]:
    """Weights by name, as `encoder.param_specs`."""
    return encoder.param_specs(config, _NAMES)


def classifier(hf: HFConfig) -> Head:
    """The head of DistilBertForSequenceClassification."""
    size = Config.from_hf(hf).hidden_size
    dense = Dense("pre_classifier", size, size, "relu")
    return class_head(hf, "cls", dense, Dense("classifier", size, len(class_labels(hf))))
