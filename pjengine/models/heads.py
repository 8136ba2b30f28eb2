"""Heads: from the hidden states of a text's tokens to what the engine gives, an embedding or the logits of classes."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pjengine.models.hf_config import HFConfig
from pjengine.models.layers import unembed
from pjengine.models.params import ParamSpec, linear_specs
from pjengine.models.pooling import pool, unit_length
from pjengine.pallas_kernels import layer_norm
from pjengine.step_inputs import StepInputs

_FUNCTIONS = {
    "identity": lambda x: x,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
}
ACTIVATIONS = tuple(_FUNCTIONS)


@dataclasses.dataclass(frozen=True)
class Dense:
    """A linear layer of a head, its activation and, behind that, where there is one, a layer norm.

    Attributes:
      module: checkpoint name of the torch.nn.Linear.
      inputs, outputs: elements of a row before and after.
      activation: one of ACTIVATIONS.
      norm: checkpoint name of the torch.nn.LayerNorm; None: none. norm_bias: it has a bias.
    """

    module: str
    inputs: int
    outputs: int
    activation: str = "identity"
    bias: bool = True
    norm: str | None = None
    norm_bias: bool = True
    norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class Head:
    """What becomes of a text's hidden states: pooled, then through `layers`, then scaled or not. Static under jit.

    Attributes:
      task: "embed" or "classify".
      pooling: one of `pooling.POOLINGS`.
      layers: the last one's outputs are the result; none: the pooled hidden state is.
      normalize: the result is scaled to length 1.
      token_ids: instead of `layers`, a language model's logits: the first id's or, of two ids, the first's less the
        second's (Qwen3-Reranker's yes and no).
      labels: names of the classes.
      activation: one of `pjengine.activations.ACTIVATIONS`, for the host to apply to the logits.
    """

    task: Literal["embed", "classify"]
    pooling: str
    layers: tuple[Dense, ...] = ()
    normalize: bool = False
    token_ids: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    activation: str = "identity"

    def size(self, hidden_size: int) -> int:
        """Elements of the result. hidden_size: the model's."""
        if self.token_ids:
            return 1
        return self.layers[-1].outputs if self.layers else hidden_size


def param_specs(head: Head) -> list[dict[str, ParamSpec]]:
    """The head's own weights, one dict per layer."""
    return [_layer_specs(layer) for layer in head.layers]


def _layer_specs(layer: Dense) -> dict[str, ParamSpec]:
    specs = linear_specs("weight", (None, layer.inputs), (None, layer.outputs), [layer.module], bias=layer.bias)
    if layer.norm is not None:
        specs["norm"] = ParamSpec((layer.outputs,), (None,), (f"{layer.norm}.weight",), init="ones")
        if layer.norm_bias:
            specs["norm_bias"] = ParamSpec((layer.outputs,), (None,), (f"{layer.norm}.bias",), init="zeros")
    return specs


def apply(head: Head, params: dict[str, Any], hidden: jax.Array, inputs: StepInputs) -> jax.Array:
    """Results of a step's rows, float32 [R, size]; rows without tokens are unspecified but finite.

    Args:
      params: of the model, with those of `param_specs` under "head"; products are taken in their dtype, sums in
        float32.
      hidden: [T, hidden_size], of whole sequences packed one after the other.
    """
    x = pool(hidden, inputs, head.pooling)
    if head.token_ids:
        ids = jnp.asarray(head.token_ids)
        columns = params["lm_head"][:, ids] if "lm_head" in params else params["embed"][ids].T
        logits = unembed(x.astype(columns.dtype), columns)
        return logits[:, :1] - logits[:, 1:] if len(head.token_ids) == 2 else logits
    for layer, weights in zip(head.layers, params.get("head", ()), strict=True):
        x = unembed(x.astype(weights["weight"].dtype), weights["weight"])
        if layer.bias:
            x += weights["weight_bias"]
        x = _FUNCTIONS[layer.activation](x)
        if layer.norm is not None:
            x = layer_norm(x, weights["norm"], weights.get("norm_bias"), layer.norm_eps)
    return unit_length(x) if head.normalize else x


def class_head(hf: HFConfig, pooling: str, *layers: Dense) -> Head:
    """The head of a `…ForSequenceClassification`, its labels and activation as config.json says."""
    labels = class_labels(hf)
    return Head("classify", pooling, layers, labels=labels, activation=class_activation(hf, len(labels)))


def class_labels(hf: HFConfig) -> tuple[str, ...]:
    """Names of the classes, in the order of the logits; transformers leaves the default, two of them, out."""
    names = hf.get("id2label")
    if not names:
        return tuple(f"LABEL_{i}" for i in range(int(hf.get("num_labels") or 2)))
    return tuple(str(names[key]) for key in sorted(names, key=int))


def class_activation(hf: HFConfig, labels: int) -> str:
    """How transformers' pipelines make scores of logits: by `problem_type`, else by the number of labels."""
    match hf.get("problem_type"):
        case "regression":
            return "identity"
        case "multi_label_classification":
            return "sigmoid"
        case _:
            return "sigmoid" if labels == 1 else "softmax"
