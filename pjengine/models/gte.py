"""GTE encoders (arXiv:2407.19669): gte-multilingual, gte-en-v1.5, arctic-embed-m-v2.0; and their rerankers."""

from __future__ import annotations

from typing import Any, Self

from pjengine.models import glu_encoder
from pjengine.models.glu_encoder import GLUEncoderConfig, LayerNames, cache_specs, forward
from pjengine.models.heads import Dense, Head, class_head, class_labels
from pjengine.models.hf_config import HFConfig, allow, head_dim, required
from pjengine.models.rope import LinearScaling, Rope

__all__ = ["Config", "cache_specs", "classifier", "forward", "param_specs"]

_NAMES = LayerNames(
    embed_norm="embeddings.LayerNorm",
    layers="encoder.layer",
    qkv="attention.qkv_proj",
    o="attention.o_proj",
    attn_norm="attn_ln",
    gated=("mlp.up_gate_proj",),
    down="mlp.down_proj",
    mlp_norm="mlp_ln",
)


class Config(GLUEncoderConfig):
    """A GeGLU encoder; how its authors' code pads and packs (`unpad_inputs`, …) changes no result."""

    @classmethod
    def from_hf(cls, hf: HFConfig) -> Self:
        """Reads config.json; ModelError names a field that cannot be honoured."""
        allow(hf, "hidden_act", "gelu")
        allow(hf, "position_embedding_type", "rope")
        allow(hf, "layer_norm_type", "layer_norm")
        allow(hf, "pack_qkv", True)
        allow(hf, "logn_attention_scale", False)
        allow(hf, "quantization_config", None)
        return cls(
            vocab_size=int(required(hf, "vocab_size")),
            hidden_size=int(required(hf, "hidden_size")),
            num_layers=int(required(hf, "num_hidden_layers")),
            max_position_embeddings=int(required(hf, "max_position_embeddings")),
            num_heads=int(required(hf, "num_attention_heads")),
            mlp_size=int(required(hf, "intermediate_size")),
            type_vocab_size=int(hf.get("type_vocab_size", 1)),
            layer_norm_eps=float(hf.get("layer_norm_eps", 1e-12)),
            rope=_rope(hf),
            activation="gelu",
            attn_bias=True,
            down_bias=True,
        )


def _rope(hf: HFConfig) -> Rope:
    """Of type "ntk", theirs: the base times the factor, and all wavelengths stretched by factor ** (2 / head_dim)."""
    scaling, size = hf.get("rope_scaling") or {}, head_dim(hf)
    if scaling.get("type") != "ntk":
        return Rope.from_hf({"rope_theta": 160000.0, **hf}, size)
    allow(scaling, "mixed_b", None)
    factor, theta = float(required(scaling, "factor")), float(required(hf, "rope_theta"))
    return Rope(size, theta * factor, LinearScaling(factor ** (2 / size)))


def param_specs(config: GLUEncoderConfig) -> dict[str, Any]:
    """Weights by name, as `glu_encoder.param_specs`."""
    return glu_encoder.param_specs(config, _NAMES)


def classifier(hf: HFConfig) -> Head:
    """The head of GteForSequenceClassification: gte-multilingual-reranker."""
    size = Config.from_hf(hf).hidden_size
    pooler = Dense(f"{hf['model_type']}.pooler.dense", size, size, "tanh")
    return class_head(hf, "cls", pooler, Dense("classifier", size, len(class_labels(hf))))
