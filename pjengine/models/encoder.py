"""The post-norm encoder that BERT introduced and RoBERTa and DistilBERT share; a model file picks its options."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax

from pjengine.models.hf_config import HFConfig, allow, head_dim, required
from pjengine.models.layers import linear, linear_gelu
from pjengine.models.params import ParamSpec, linear_specs, norm_specs
from pjengine.models.relative_positions import relative_buckets
from pjengine.pallas_kernels import (
    encoder_stack,
    layer_norm,
    pack_layers,
    packed_attention_qkv,
    serves_encoder_stack,
)
from pjengine.pallas_kernels.specs import EncoderStackSpec
from pjengine.step_inputs import CacheSpec, KVCache, StepInputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape and options of an encoder; static under jit.

    Attributes:
      max_position_embeddings: longest sequence, tokens.
      position_offset: rows of the position table before that of a sequence's first token.
      type_vocab_size: rows of the token type (segment) table; 0: there is none.
      relative_buckets: rows of the table of biases by relative position; 0: there is none.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int
    num_heads: int
    mlp_size: int
    type_vocab_size: int
    layer_norm_eps: float
    position_offset: int = 0
    relative_buckets: int = 0

    def stack_spec(self, dtype: str) -> EncoderStackSpec | None:
        """What `encoder_stack` would have to serve; None: it knows no biases by relative position."""
        if self.relative_buckets:
            return None
        return EncoderStackSpec(self.hidden_size, self.num_heads, self.mlp_size, dtype)

    @classmethod
    def read(cls, hf: HFConfig, *, position_offset: int = 0) -> Self:
        """What BERT and RoBERTa spell alike in config.json; a model adds its position_offset."""
        allow(hf, "hidden_act", "gelu")
        allow(hf, "position_embedding_type", None, "absolute")
        allow(hf, "is_decoder", False)
        allow(hf, "quantization_config", None)
        head_dim(hf)  # refuses heads that do not divide hidden_size
        return cls(
            vocab_size=int(required(hf, "vocab_size")),
            hidden_size=int(required(hf, "hidden_size")),
            num_layers=int(required(hf, "num_hidden_layers")),
            max_position_embeddings=int(required(hf, "max_position_embeddings")) - position_offset,
            num_heads=int(required(hf, "num_attention_heads")),
            mlp_size=int(required(hf, "intermediate_size")),
            type_vocab_size=int(hf.get("type_vocab_size", 2)),
            layer_norm_eps=float(hf.get("layer_norm_eps", 1e-12)),
            position_offset=position_offset,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNames:
    """What a checkpoint calls the modules of a layer, seen from `{layers}.{i}`."""

    layers: str = "encoder.layer"
    qkv: tuple[str, str, str] = ("attention.self.query", "attention.self.key", "attention.self.value")
    o: str = "attention.output.dense"
    attn_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    mlp_norm: str = "output.LayerNorm"


BERT_NAMES = LayerNames()


def param_specs(config: EncoderConfig, names: LayerNames = BERT_NAMES) -> dict[str, Any]:
    """Weights by name: the embedding tables, their norm, layers[i]. The pooler's are not read."""
    hidden = config.hidden_size

    def table(rows: int, axis: str | None, name: str) -> ParamSpec:
        return ParamSpec((rows, hidden), (axis, "embed"), (f"embeddings.{name}_embeddings.weight",))

    specs = {
        "embed": table(config.vocab_size, "vocab", "word"),
        "position_embed": table(config.max_position_embeddings + config.position_offset, None, "position"),
        **norm_specs("embed_norm", "embeddings.LayerNorm", hidden),
        "layers": [_layer_specs(config, names, f"{names.layers}.{i}") for i in range(config.num_layers)],
    }
    if config.type_vocab_size:
        specs["type_embed"] = table(config.type_vocab_size, None, "token_type")
    return specs


def _layer_specs(config: EncoderConfig, names: LayerNames, prefix: str) -> dict[str, ParamSpec]:
    hidden, mlp = ("embed", config.hidden_size), ("mlp", config.mlp_size)
    heads, qkv = ("heads", config.hidden_size), ("qkv", 3 * config.hidden_size)
    return {
        **linear_specs("qkv", hidden, qkv, [f"{prefix}.{module}" for module in names.qkv], bias=True),
        **linear_specs("o", heads, hidden, [f"{prefix}.{names.o}"], bias=True),
        **norm_specs("attn_norm", f"{prefix}.{names.attn_norm}", config.hidden_size),
        **linear_specs("up", hidden, mlp, [f"{prefix}.{names.up}"], bias=True),
        **linear_specs("down", mlp, hidden, [f"{prefix}.{names.down}"], bias=True),
        **norm_specs("mlp_norm", f"{prefix}.{names.mlp_norm}", config.hidden_size),
    }


def cache_specs(config: EncoderConfig) -> tuple[CacheSpec, ...]:
    """Empty: an encoder sees whole sequences and keeps nothing."""
    return ()


def params_for_few(params: dict[str, Any], config: EncoderConfig, backend: str) -> dict[str, Any] | None:
    """The weights for the smallest batches, where one launch serves all layers: those of the layers a second time."""
    spec = config.stack_spec(params["embed"].dtype.name)
    if spec is None or not serves_encoder_stack(spec, backend):
        return None
    others = {name: value for name, value in params.items() if name != "layers"}
    return {**others, "packed": pack_layers(params["layers"], config.num_heads)}


def forward(
    params: dict[str, Any], inputs: StepInputs, cache: KVCache | None, config: EncoderConfig
) -> tuple[jax.Array, KVCache | None]:
    """Hidden states [T, hidden_size] of packed whole sequences; `pooling.pool` makes embeddings of them.

    Args:
      params: arrays in the tree of `param_specs` or of `params_for_few`; their dtype is the dtype of the computation.
      inputs: T tokens of R rows, each row a whole sequence.
      cache: passed through; encoders have none.
    """
    x = params["embed"][inputs.token_ids] + params["position_embed"][inputs.positions + config.position_offset]
    if config.type_vocab_size:
        x += params["type_embed"][0] if inputs.token_types is None else params["type_embed"][inputs.token_types]
    x = _norm(x, params, "embed_norm", config, inputs)
    if "packed" in params:
        return encoder_stack(x, inputs.query_starts, params["packed"], eps=config.layer_norm_eps), cache
    bias = params["relative_bias"][relative_buckets(config.relative_buckets)].T if config.relative_buckets else None
    for layer in params["layers"]:
        x = _layer(layer, x, bias, inputs, config)
    return x, cache


# Compiled as part of its caller; the jit makes one trace serve all layers.
@functools.partial(jax.jit, static_argnames="config")
def _layer(
    layer: dict[str, jax.Array], x: jax.Array, bias: jax.Array | None, inputs: StepInputs, config: EncoderConfig
) -> jax.Array:
    heads = config.num_heads
    qkv = linear(x, layer["qkv"], layer["qkv_bias"]).reshape(x.shape[0], 3 * heads, -1)
    attended = packed_attention_qkv(
        qkv,
        inputs.query_starts,
        kv_heads=heads,
        scale=qkv.shape[-1] ** -0.5,
        relative_bias=bias,
        backend=inputs.backend,
    )
    x = _norm(x + linear(attended.reshape(x.shape), layer["o"], layer["o_bias"]), layer, "attn_norm", config, inputs)
    up = linear_gelu(x, layer["up"], layer["up_bias"], epilogue=inputs.epilogues)
    return _norm(x + linear(up, layer["down"], layer["down_bias"]), layer, "mlp_norm", config, inputs)


def _norm(
    x: jax.Array, params: dict[str, jax.Array], name: str, config: EncoderConfig, inputs: StepInputs
) -> jax.Array:
    weight, bias = params[name], params[f"{name}_bias"]
    return layer_norm(x, weight, bias, config.layer_norm_eps, backend=inputs.backend)
