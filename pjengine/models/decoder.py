"""The pre-norm decoder that Llama introduced and Qwen and Mistral share; a model file picks its options."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax

from pjengine.errors import ModelError
from pjengine.models.heads import Dense, Head, class_head, class_labels
from pjengine.models.hf_config import HFConfig, allow, head_dim, required
from pjengine.models.layers import causal_attention_qkv, linear, linear_swiglu, unembed
from pjengine.models.params import ParamSpec, linear_specs
from pjengine.models.rope import Rope
from pjengine.pallas_kernels import Projection, rms_norm
from pjengine.step_inputs import CacheSpec, KVCache, LayerCache, StepInputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and options of a decoder; static under jit.

    Attributes:
      max_position_embeddings: longest sequence the model was made for, tokens.
      windows: per layer, how many of the last tokens a query sees, its own included; None: all.
      qkv_bias, o_bias, mlp_bias: which linear layers add a bias.
      qk_norm: RMS norm of each query and key head before rotation.
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
    rope: Rope
    windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def read(cls, hf: HFConfig, *, windows: tuple[int | None, ...] | None = None, **options: bool) -> Self:
        """What all decoders spell alike in config.json; a model adds its windows and options."""
        allow(hf, "hidden_act", "silu")
        allow(hf, "is_causal", True)  # a decoder made an encoder, such as gte-Qwen2
        allow(hf, "quantization_config", None)
        num_layers, size = int(required(hf, "num_hidden_layers")), head_dim(hf)
        num_heads = int(required(hf, "num_attention_heads"))
        num_kv_heads = int(hf.get("num_key_value_heads") or num_heads)
        if num_heads % num_kv_heads:
            raise ModelError(f"num_key_value_heads: {num_kv_heads} does not divide num_attention_heads {num_heads}")
        return cls(
            vocab_size=int(required(hf, "vocab_size")),
            hidden_size=int(required(hf, "hidden_size")),
            num_layers=num_layers,
            max_position_embeddings=int(required(hf, "max_position_embeddings")),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=size,
            mlp_size=int(required(hf, "intermediate_size")),
            rms_norm_eps=float(required(hf, "rms_norm_eps")),
            rope=Rope.from_hf(hf, size),
            windows=windows or (None,) * num_layers,
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            **options,
        )


def param_specs(config: DecoderConfig) -> dict[str, Any]:
    """Weights by name: embed, layers[i], norm and, unless tied to embed, lm_head."""
    vocab, hidden = config.vocab_size, config.hidden_size
    specs: dict[str, Any] = {
        "embed": ParamSpec((vocab, hidden), ("vocab", "embed"), ("model.embed_tokens.weight",)),
        "layers": [_layer_specs(config, f"model.layers.{i}") for i in range(config.num_layers)],
        "norm": ParamSpec((hidden,), ("embed",), ("model.norm.weight",), init="ones"),
    }
    if not config.tie_word_embeddings:
        specs["lm_head"] = ParamSpec((hidden, vocab), ("embed", "vocab"), ("lm_head.weight",), transpose=True)
    return specs


def _layer_specs(config: DecoderConfig, prefix: str) -> dict[str, ParamSpec]:
    head_dim = config.head_dim
    hidden, heads = ("embed", config.hidden_size), ("heads", config.num_heads * head_dim)
    qkv = ("qkv", (config.num_heads + 2 * config.num_kv_heads) * head_dim)
    mlp, gate_up = ("mlp", config.mlp_size), ("gate_up", 2 * config.mlp_size)
    q_k_v = [f"{prefix}.self_attn.{m}_proj" for m in ("q", "k", "v")]
    gate_and_up = [f"{prefix}.mlp.{m}_proj" for m in ("gate", "up")]

    def norm(size: int, name: str) -> ParamSpec:
        return ParamSpec((size,), (None,), (f"{prefix}.{name}.weight",), init="ones")

    specs = {
        "attn_norm": norm(config.hidden_size, "input_layernorm"),
        **linear_specs("qkv", hidden, qkv, q_k_v, bias=config.qkv_bias),
        **linear_specs("o", heads, hidden, [f"{prefix}.self_attn.o_proj"], bias=config.o_bias),
        "mlp_norm": norm(config.hidden_size, "post_attention_layernorm"),
        **linear_specs("gate_up", hidden, gate_up, gate_and_up, bias=config.mlp_bias),
        **linear_specs("down", mlp, hidden, [f"{prefix}.mlp.down_proj"], bias=config.mlp_bias),
    }
    if config.qk_norm:
        specs |= {"q_norm": norm(head_dim, "self_attn.q_norm"), "k_norm": norm(head_dim, "self_attn.k_norm")}
    return specs


def cache_specs(config: DecoderConfig) -> tuple[CacheSpec, ...]:
    """What each layer keeps per token."""
    return tuple(CacheSpec(config.num_kv_heads, config.head_dim, window) for window in config.windows)


def forward(
    params: dict[str, Any], inputs: StepInputs, cache: KVCache | None, config: DecoderConfig
) -> tuple[jax.Array, KVCache | None]:
    """Hidden states of a step's tokens, after the final norm: what `logits` reads.

    Args:
      params: arrays in the tree of `param_specs`; their dtype is the dtype of the computation.
      inputs: T tokens of R rows.
      cache: pages to read and write, donated; None: the rows are whole sequences and see only themselves.
    Returns: [T, hidden_size], and the updated cache.
    """
    rotation = config.rope.cos_sin(inputs.positions)
    pages: list[Any] = [None] * config.num_layers if cache is None else list(cache.layers)
    groups = (0,) * config.num_layers if cache is None else cache.groups
    x = params["embed"][inputs.token_ids]
    for i, layer in enumerate(params["layers"]):
        x, pages[i] = _layer(layer, x, rotation, inputs, pages[i], config, config.windows[i], groups[i])
    if cache is not None:
        cache = dataclasses.replace(cache, layers=tuple(pages))
    return _norm(x, params["norm"], config, inputs), cache


def logits(params: dict[str, Any], hidden: jax.Array, config: DecoderConfig) -> jax.Array:
    """float32 [N, vocab_size] of hidden [N, hidden_size]."""
    return unembed(hidden, params["embed"].T if config.tie_word_embeddings else params["lm_head"])


def classifier(hf: HFConfig) -> Head:
    """The head of a decoder's …ForSequenceClassification: the last token's score, as of converted Qwen3-Rerankers."""
    return class_head(hf, "last", Dense("score", int(required(hf, "hidden_size")), len(class_labels(hf)), bias=False))


# Compiled as part of its caller; the jit makes one trace serve all layers.
@functools.partial(jax.jit, static_argnames=("config", "window", "group"))
def _layer(
    layer: dict[str, jax.Array],
    x: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    inputs: StepInputs,
    pages: LayerCache | None,
    config: DecoderConfig,
    window: int | None,
    group: int,
) -> tuple[jax.Array, LayerCache | None]:
    projection = Projection(
        weight=layer["qkv"],
        bias=layer.get("qkv_bias"),
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        q_norm=layer.get("q_norm"),
        k_norm=layer.get("k_norm"),
        eps=config.rms_norm_eps,
    )
    y = _norm(x, layer["attn_norm"], config, inputs)
    attended, pages = causal_attention_qkv(y, projection, rotation, inputs, pages, window=window, group=group)
    x = x + linear(attended.reshape(x.shape[0], -1), layer["o"], layer.get("o_bias"))
    y = _norm(x, layer["mlp_norm"], config, inputs)
    y = linear_swiglu(y, layer["gate_up"], layer.get("gate_up_bias"), backend=inputs.backend)
    return x + linear(y, layer["down"], layer.get("down_bias")), pages


def _norm(x: jax.Array, weight: jax.Array, config: DecoderConfig, inputs: StepInputs) -> jax.Array:
    return rms_norm(x, weight, config.rms_norm_eps, backend=inputs.backend)
