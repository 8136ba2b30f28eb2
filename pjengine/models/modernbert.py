"""ModernBERT encoders (arXiv:2412.13663): gte-modernbert, nomic's modernbert-embed and other sentence embedders."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax

from pjengine.models.heads import Dense, Head, class_head, class_labels
from pjengine.models.hf_config import HFConfig, allow, head_dim, layer_windows, required
from pjengine.models.layers import attention_qkv, geglu, linear
from pjengine.models.params import ParamSpec, linear_specs
from pjengine.models.rope import Rope, layer_ropes
from pjengine.pallas_kernels import Projection, layer_norm
from pjengine.step_inputs import CacheSpec, KVCache, StepInputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of an encoder; static under jit.

    Attributes:
      max_position_embeddings: longest sequence the model was made for, tokens.
      windows: per layer: a token at position p sees (p - window, p + window); None: all (a global layer).
      global_rope, local_rope: rotary embedding of the global layers and of those with a window.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int
    num_heads: int
    mlp_size: int
    norm_eps: float
    windows: tuple[int | None, ...]
    global_rope: Rope
    local_rope: Rope

    @classmethod
    def from_hf(cls, hf: HFConfig) -> Self:
        """Reads config.json; ModelError names a field that cannot be honoured."""
        allow(hf, "hidden_activation", "gelu")
        for bias in ("attention_bias", "mlp_bias", "norm_bias"):
            allow(hf, bias, False)
        allow(hf, "quantization_config", None)
        allow(hf, "rope_scaling", None)
        global_rope, local_rope = layer_ropes(
            hf, head_dim(hf), ("global_rope_theta", 160000.0), ("local_rope_theta", 10000.0)
        )
        return cls(
            vocab_size=int(required(hf, "vocab_size")),
            hidden_size=int(required(hf, "hidden_size")),
            num_layers=int(required(hf, "num_hidden_layers")),
            max_position_embeddings=int(required(hf, "max_position_embeddings")),
            num_heads=int(required(hf, "num_attention_heads")),
            mlp_size=int(required(hf, "intermediate_size")),
            norm_eps=float(hf.get("norm_eps", 1e-5)),
            windows=_windows(hf),
            global_rope=global_rope,
            local_rope=local_rope,
        )


def _windows(hf: HFConfig) -> tuple[int | None, ...]:
    """`local_attention` counts both sides: a token sees half of it before and half after itself."""
    kinds = hf.get("layer_types")
    if kinds is None:  # before transformers 5
        every = int(hf.get("global_attn_every_n_layers", 3))
        layers = range(int(required(hf, "num_hidden_layers")))
        kinds = ["sliding_attention" if i % every else "full_attention" for i in layers]
    window = int(hf.get("local_attention", 128)) // 2 + 1
    return layer_windows({**hf, "layer_types": kinds, "use_sliding_window": True, "sliding_window": window})


def param_specs(config: Config) -> dict[str, Any]:
    """Weights by name: embed, its norm, layers[i], norm."""
    return {
        "embed": ParamSpec(
            (config.vocab_size, config.hidden_size), ("vocab", "embed"), ("model.embeddings.tok_embeddings.weight",)
        ),
        "embed_norm": _norm_spec(config, "model.embeddings.norm"),
        "layers": [_layer_specs(config, i) for i in range(config.num_layers)],
        "norm": _norm_spec(config, "model.final_norm"),
    }


def _layer_specs(config: Config, layer: int) -> dict[str, ParamSpec]:
    prefix, hidden, heads = f"model.layers.{layer}", ("embed", config.hidden_size), ("heads", config.hidden_size)
    qkv, mlp, gate_up = ("qkv", 3 * config.hidden_size), ("mlp", config.mlp_size), ("gate_up", 2 * config.mlp_size)
    specs = {
        **linear_specs("qkv", hidden, qkv, [f"{prefix}.attn.Wqkv"], bias=False),
        **linear_specs("o", heads, hidden, [f"{prefix}.attn.Wo"], bias=False),
        "mlp_norm": _norm_spec(config, f"{prefix}.mlp_norm"),
        **linear_specs("gate_up", hidden, gate_up, [f"{prefix}.mlp.Wi"], bias=False),
        **linear_specs("down", mlp, hidden, [f"{prefix}.mlp.Wo"], bias=False),
    }
    if layer:  # the first reads the embeddings, which are normalised already
        specs["attn_norm"] = _norm_spec(config, f"{prefix}.attn_norm")
    return specs


def _norm_spec(config: Config, module: str) -> ParamSpec:
    return ParamSpec((config.hidden_size,), (None,), (f"{module}.weight",), init="ones")


def classifier(hf: HFConfig) -> Head:
    """The head of ModernBertForSequenceClassification: gte-reranker-modernbert and other cross-encoders."""
    allow(hf, "classifier_activation", "gelu")
    allow(hf, "classifier_pooling", "cls", "mean")
    config = Config.from_hf(hf)
    size = config.hidden_size
    dense = Dense(
        "head.dense",
        size,
        size,
        "gelu",
        bias=bool(hf.get("classifier_bias", False)),
        norm="head.norm",
        norm_bias=False,
        norm_eps=config.norm_eps,
    )
    out = Dense("classifier", size, len(class_labels(hf)))
    return class_head(hf, hf.get("classifier_pooling", "cls"), dense, out)


def cache_specs(config: Config) -> tuple[CacheSpec, ...]:
    """Empty: an encoder sees whole sequences and keeps nothing."""
    return ()


def forward(
    params: dict[str, Any], inputs: StepInputs, cache: KVCache | None, config: Config
) -> tuple[jax.Array, KVCache | None]:
    """Hidden states [T, hidden_size] of packed whole sequences; `pooling.pool` makes embeddings of them.

    Args:
      params: arrays in the tree of `param_specs`; their dtype is the dtype of the computation.
      inputs: T tokens of R rows, each row a whole sequence.
      cache: passed through; encoders have none.
    """
    global_rotation, local_rotation = (r.cos_sin(inputs.positions) for r in (config.global_rope, config.local_rope))
    x = _norm(params["embed"][inputs.token_ids], params["embed_norm"], config, inputs)
    for layer, window in zip(params["layers"], config.windows, strict=True):
        x = _layer(layer, x, local_rotation if window else global_rotation, inputs, config, window)
    return _norm(x, params["norm"], config, inputs), cache


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
    y = _norm(x, layer["attn_norm"], config, inputs) if "attn_norm" in layer else x
    heads, head_dim = config.num_heads, config.hidden_size // config.num_heads
    projection = Projection(weight=layer["qkv"], kv_heads=heads, head_dim=head_dim)
    attended = attention_qkv(y, projection, rotation, inputs, window=window)
    x = x + linear(attended.reshape(x.shape), layer["o"])
    gate_up = linear(_norm(x, layer["mlp_norm"], config, inputs), layer["gate_up"])
    return x + linear(geglu(gate_up), layer["down"])


def _norm(x: jax.Array, weight: jax.Array, config: Config, inputs: StepInputs) -> jax.Array:
    return layer_norm(x, weight, None, config.norm_eps, backend=inputs.backend)
