"""Gemma 3 as a bidirectional encoder: EmbeddingGemma (arXiv:2509.20354)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp

from pjengine.errors import ModelError
from pjengine.models.hf_config import HFConfig, allow, head_dim, layer_windows, required
from pjengine.models.layers import linear, split_heads
from pjengine.models.params import ParamSpec, linear_specs
from pjengine.models.rope import Rope, layer_ropes
from pjengine.pallas_kernels import apply_rope, packed_attention, rms_norm
from pjengine.step_inputs import CacheSpec, KVCache, StepInputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of an encoder; static under jit.

    Attributes:
      max_position_embeddings: longest sequence the model was made for, tokens.
      scale: multiplies q·k.
      windows: per layer: a token at position p sees (p - window, p + window); None: all (a global layer).
      global_rope, local_rope: rotary embedding of the global layers and of those with a window.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rms_norm_eps: float
    scale: float
    windows: tuple[int | None, ...]
    global_rope: Rope
    local_rope: Rope

    @classmethod
    def from_hf(cls, hf: HFConfig) -> Self:
        """Reads config.json; ModelError names a field that cannot be honoured."""
        if not hf.get("use_bidirectional_attention"):
            raise ModelError(
                f"use_bidirectional_attention: expected True (EmbeddingGemma), got "
                f"{hf.get('use_bidirectional_attention')!r}; Gemma 3 that generates is not supported"
            )
        allow(hf, "hidden_activation", "gelu_pytorch_tanh")
        allow(hf, "attention_bias", False)
        allow(hf, "attn_logit_softcapping", None)
        allow(hf, "quantization_config", None)
        size, num_layers = head_dim(hf), int(required(hf, "num_hidden_layers"))
        every = int(hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6)
        kinds = hf.get("layer_types") or [
            "sliding_attention" if (i + 1) % every else "full_attention" for i in range(num_layers)
        ]
        # config.json counts both sides of a token together; transformers halves it as it reads.
        window = int(required(hf, "sliding_window")) // 2 + 1
        global_rope, local_rope = layer_ropes(hf, size, ("rope_theta", 1_000_000.0), ("rope_local_base_freq", 10_000.0))
        return cls(
            vocab_size=int(required(hf, "vocab_size")),
            hidden_size=int(required(hf, "hidden_size")),
            num_layers=num_layers,
            max_position_embeddings=int(required(hf, "max_position_embeddings")),
            num_heads=int(required(hf, "num_attention_heads")),
            num_kv_heads=int(required(hf, "num_key_value_heads")),
            head_dim=size,
            mlp_size=int(required(hf, "intermediate_size")),
            rms_norm_eps=float(required(hf, "rms_norm_eps")),
            scale=float(required(hf, "query_pre_attn_scalar")) ** -0.5,
            windows=layer_windows({**hf, "layer_types": kinds, "use_sliding_window": True, "sliding_window": window}),
            global_rope=global_rope,
            local_rope=local_rope,
        )


def param_specs(config: Config) -> dict[str, Any]:
    """Weights by name: embed, layers[i], norm. A norm multiplies by one plus its weight."""
    return {
        "embed": ParamSpec((config.vocab_size, config.hidden_size), ("vocab", "embed"), ("model.embed_tokens.weight",)),
        "layers": [_layer_specs(config, f"model.layers.{i}") for i in range(config.num_layers)],
        "norm": _norm_spec(config.hidden_size, "model.norm"),
    }


def _layer_specs(config: Config, prefix: str) -> dict[str, ParamSpec]:
    hidden, heads = ("embed", config.hidden_size), ("heads", config.num_heads * config.head_dim)
    qkv = ("qkv", (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
    mlp, gate_up = ("mlp", config.mlp_size), ("gate_up", 2 * config.mlp_size)
    norms = {
        "attn_norm": "input_layernorm",
        "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
    return {
        **{name: _norm_spec(config.hidden_size, f"{prefix}.{module}") for name, module in norms.items()},
        **{f"{m}_norm": _norm_spec(config.head_dim, f"{prefix}.self_attn.{m}_norm") for m in ("q", "k")},
        **linear_specs("qkv", hidden, qkv, [f"{prefix}.self_attn.{m}_proj" for m in ("q", "k", "v")], bias=False),
        **linear_specs("o", heads, hidden, [f"{prefix}.self_attn.o_proj"], bias=False),
        **linear_specs("gate_up", hidden, gate_up, [f"{prefix}.mlp.{m}_proj" for m in ("gate", "up")], bias=False),
        **linear_specs("down", mlp, hidden, [f"{prefix}.mlp.down_proj"], bias=False),
    }


def _norm_spec(size: int, module: str) -> ParamSpec:
    return ParamSpec((size,), (None,), (f"{module}.weight",), init="zeros")


def cache_specs(config: Config) -> tuple[CacheSpec, ...]:
    """Empty: an encoder sees whole sequences and keeps nothing."""
    return ()


def forward(
    params: dict[str, Any], inputs: StepInputs, cache: KVCache | None, config: Config
) -> tuple[jax.Array, KVCache | None]:
    """Hidden states [T, hidden_size] of packed whole sequences; a head makes embeddings of them.

    Args:
      params: arrays in the tree of `param_specs`; their dtype is the dtype of the computation.
      inputs: T tokens of R rows, each row a whole sequence.
      cache: passed through; encoders have none.
    """
    global_rotation, local_rotation = (r.cos_sin(inputs.positions) for r in (config.global_rope, config.local_rope))
    x = params["embed"][inputs.token_ids]
    x *= jnp.asarray(config.hidden_size**0.5, x.dtype)  # rounded to the weights' dtype, as the model was trained
    for layer, window in zip(params["layers"], config.windows, strict=True):
        x = _layer(layer, x, local_rotation if window else global_rotation, inputs, config, window)
    return _norm(x, params["norm"], config), cache


# Compiled as part of its caller; the jit makes one trace serve all layers of a kind.
@functools.partial(jax.jit, static_argnames=("config", "window"))
def _layer(
    layer: dict[str, jax.Array],
    x: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    inputs: StepInputs,
    config: Config,
    window: int | None,
) -> jax.Array:
    qkv = linear(_norm(x, layer["attn_norm"], config), layer["qkv"])
    q, k, v = split_heads(qkv, config.num_heads, config.num_kv_heads)
    q, k = (apply_rope(_norm(y, layer[f"{n}_norm"], config), *rotation) for n, y in (("q", q), ("k", k)))
    attended = packed_attention(q, k, v, inputs.query_starts, scale=config.scale, window=window, backend=inputs.backend)
    x = x + _norm(linear(attended.reshape(x.shape[0], -1), layer["o"]), layer["attn_out_norm"], config)
    gate_up = linear(_norm(x, layer["mlp_norm"], config), layer["gate_up"])
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    mlp = (jax.nn.gelu(gate, approximate=True) * up).astype(x.dtype)
    return x + _norm(linear(mlp, layer["down"]), layer["mlp_out_norm"], config)


def _norm(x: jax.Array, weight: jax.Array, config: Config) -> jax.Array:
    return rms_norm(x, 1 + weight.astype(jnp.float32), config.rms_norm_eps)
