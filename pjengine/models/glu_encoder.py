"""The post-norm encoder with rotary positions and a gated MLP that Nomic BERT and GTE share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pjengine.models.layers import attention_qkv, linear
from pjengine.models.params import ParamSpec, linear_specs, norm_specs
from pjengine.models.rope import Rope
from pjengine.pallas_kernels import Projection, layer_norm
from pjengine.step_inputs import CacheSpec, KVCache, StepInputs

_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLUEncoderConfig:
    """Shape and options of an encoder; static under jit.

    Attributes:
      max_position_embeddings: longest sequence, tokens.
      type_vocab_size: rows of the token type (segment) table; 0: there is none.
      activation: of the MLP's gate, "silu" or "gelu" (by erf).
      attn_bias, down_bias: which linear layers add a bias; the MLP's gate and up have none.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int
    num_heads: int
    mlp_size: int
    type_vocab_size: int
    layer_norm_eps: float
    rope: Rope
    activation: str
    attn_bias: bool
    down_bias: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNames:
    """What a checkpoint calls the modules of a layer, seen from `{layers}.{i}`. gated: one or two, as stored."""

    embed_norm: str
    layers: str
    qkv: str
    o: str
    attn_norm: str
    gated: tuple[str, ...]
    down: str
    mlp_norm: str


def param_specs(config: GLUEncoderConfig, names: LayerNames) -> dict[str, Any]:
    """Weights by name: the embedding tables, their norm, layers[i]."""

    def table(rows: int, axis: str | None, name: str) -> ParamSpec:
        return ParamSpec((rows, config.hidden_size), (axis, "embed"), (f"embeddings.{name}_embeddings.weight",))

    specs = {
        "embed": table(config.vocab_size, "vocab", "word"),
        **norm_specs("embed_norm", names.embed_norm, config.hidden_size),
        "layers": [_layer_specs(config, names, f"{names.layers}.{i}") for i in range(config.num_layers)],
    }
    if config.type_vocab_size:
        specs["type_embed"] = table(config.type_vocab_size, None, "token_type")
    return specs


def _layer_specs(config: GLUEncoderConfig, names: LayerNames, prefix: str) -> dict[str, ParamSpec]:
    hidden, heads = ("embed", config.hidden_size), ("heads", config.hidden_size)
    qkv, mlp, gated = ("qkv", 3 * config.hidden_size), ("mlp", config.mlp_size), ("gate_up", 2 * config.mlp_size)
    return {
        **linear_specs("qkv", hidden, qkv, [f"{prefix}.{names.qkv}"], bias=config.attn_bias),
        **linear_specs("o", heads, hidden, [f"{prefix}.{names.o}"], bias=config.attn_bias),
        **norm_specs("attn_norm", f"{prefix}.{names.attn_norm}", config.hidden_size),
        **linear_specs("up_gate", hidden, gated, [f"{prefix}.{name}" for name in names.gated], bias=False),
        **linear_specs("down", mlp, hidden, [f"{prefix}.{names.down}"], bias=config.down_bias),
        **norm_specs("mlp_norm", f"{prefix}.{names.mlp_norm}", config.hidden_size),
    }


def cache_specs(config: GLUEncoderConfig) -> tuple[CacheSpec, ...]:
    """Empty: an encoder sees whole sequences and keeps nothing."""
    return ()


def forward(
    params: dict[str, Any], inputs: StepInputs, cache: KVCache | None, config: GLUEncoderConfig
) -> tuple[jax.Array, KVCache | None]:
    """Hidden states [T, hidden_size] of packed whole sequences; a head makes embeddings or logits of them.

    Args:
      params: arrays in the tree of `param_specs`; their dtype is the dtype of the computation.
      inputs: T tokens of R rows, each row a whole sequence.
      cache: passed through; encoders have none.
    """
    x = params["embed"][inputs.token_ids]
    if config.type_vocab_size:
        x += params["type_embed"][0] if inputs.token_types is None else params["type_embed"][inputs.token_types]
    x = _norm(x, params, "embed_norm", config, inputs)
    rotation = config.rope.cos_sin(inputs.positions)
    for layer in params["layers"]:
        x = _layer(layer, x, rotation, inputs, config)
    return x, cache


# Compiled as part of its caller; the jit makes one trace serve all layers.
@functools.partial(jax.jit, static_argnames="config")
def _layer(
    layer: dict[str, jax.Array],
    x: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    inputs: StepInputs,
    config: GLUEncoderConfig,
) -> jax.Array:
    heads, head_dim = config.num_heads, config.hidden_size // config.num_heads
    projection = Projection(weight=layer["qkv"], bias=layer.get("qkv_bias"), kv_heads=heads, head_dim=head_dim)
    attended = attention_qkv(x, projection, rotation, inputs)
    x = _norm(
        x + linear(attended.reshape(x.shape), layer["o"], layer.get("o_bias")), layer, "attn_norm", config, inputs
    )
    up, gate = jnp.split(linear(x, layer["up_gate"]).astype(jnp.float32), 2, axis=-1)
    gated = (_FUNCTIONS[config.activation](gate) * up).astype(x.dtype)
    return _norm(x + linear(gated, layer["down"], layer.get("down_bias")), layer, "mlp_norm", config, inputs)


def _norm(
    x: jax.Array, params: dict[str, jax.Array], name: str, config: GLUEncoderConfig, inputs: StepInputs
) -> jax.Array:
    weight, bias = params[name], params[f"{name}_bias"]
    return layer_norm(x, weight, bias, config.layer_norm_eps, backend=inputs.backend)
