"""Nomic BERT encoders (arXiv:2402.01613): nomic-embed-text-v1 and v1.5."""

from __future__ import annotations

from typing import Any, Self

from pjengine.models import glu_encoder
from pjengine.models.glu_encoder import GLUEncoderConfig, LayerNames, cache_specs, forward
from pjengine.models.heads import Dense, Head, class_head, class_labels
from pjengine.models.hf_config import HFConfig, allow, head_dim, required
from pjengine.models.rope import Rope

__all__ = ["Config", "cache_specs", "classifier", "forward", "param_specs"]

_NAMES = LayerNames(
    embed_norm="emb_ln",
    layers="encoder.layers",
    qkv="attn.Wqkv",
    o="attn.out_proj",
    attn_norm="norm1",
    gated=("mlp.fc11", "mlp.fc12"),
    down="mlp.fc2",
    mlp_norm="norm2",
)
_OWN_FIELDS = {  # as the authors' own code spells them, to transformers' names
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
}


class Config(GLUEncoderConfig):
    """A SwiGLU encoder without biases in its linear layers."""

    @classmethod
    def from_hf(cls, hf: HFConfig) -> Self:
        """Reads config.json, of transformers or of the authors; ModelError names a field that cannot be honoured."""
        allow(hf, "activation_function", "swiglu")
        allow(hf, "hidden_act", "silu")
        allow(hf, "moe_every_n_layers", None, 0)
        allow(hf, "rotary_emb_fraction", 1, 1.0)
        allow(hf, "rotary_emb_scale_base", None)
        for field in ("prenorm", "parallel_block", "use_rms_norm", "causal", "rotary_emb_interleaved"):
            allow(hf, field, False, None)
        for field in ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"):
            allow(hf, field, False)
        allow(hf, "quantization_config", None)
        hf = {"rope_theta": 1000.0, **hf, **{name: hf[own] for own, name in _OWN_FIELDS.items() if own in hf}}
        longest = int(required(hf, "max_position_embeddings"))
        if hf.get("rotary_scaling_factor"):  # beyond the training's length rotation would depend on the text's length
            longest = min(longest, int(hf.get("max_trained_positions", 2048)))
        return cls(
            vocab_size=int(required(hf, "vocab_size")),
            hidden_size=int(required(hf, "hidden_size")),
            num_layers=int(required(hf, "num_hidden_layers")),
            max_position_embeddings=longest,
            num_heads=int(required(hf, "num_attention_heads")),
            mlp_size=int(required(hf, "intermediate_size")),
            type_vocab_size=int(hf.get("type_vocab_size", 2)),
            layer_norm_eps=float(hf.get("layer_norm_eps", 1e-12)),
            rope=Rope.from_hf(hf, head_dim(hf)),
            activation="silu",
            attn_bias=False,
            down_bias=False,
        )


def param_specs(config: GLUEncoderConfig) -> dict[str, Any]:
    """Weights by name, as `glu_encoder.param_specs`."""
    return glu_encoder.param_specs(config, _NAMES)


def classifier(hf: HFConfig) -> Head:
    """The head of NomicBertForSequenceClassification."""
    size = Config.from_hf(hf).hidden_size
    pooler = Dense("nomic_bert.pooler.dense", size, size, "tanh")
    return class_head(hf, "cls", pooler, Dense("classifier", size, len(class_labels(hf))))
