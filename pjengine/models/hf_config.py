"""Reading a Hugging Face config.json: a refusal is a ModelError that names field, value and remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pjengine.errors import ModelError

HFConfig = Mapping[str, Any]

_SIZES = (  # as most models spell them, and as DistilBERT does
    *("vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("dim", "hidden_dim", "n_layers", "n_heads"),
)


def check_sizes(hf: HFConfig) -> None:
    """ModelError where a size that is given is no integer of at least 1."""
    for field in _SIZES:
        value = hf.get(field)
        fits = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 1
        if value is not None and not fits:
            raise ModelError(f"{field}: expected an integer of at least 1 in the model's config, got {value!r}")


def required(hf: HFConfig, field: str) -> Any:
    """The value of `field`; ModelError where it is absent or null."""
    value = hf.get(field)
    if value is None:
        raise ModelError(f"{field}: missing from the config of this {hf.get('model_type', 'unnamed')} model")
    return value


def allow(hf: HFConfig, field: str, *allowed: Any) -> None:
    """ModelError unless `field` is absent or holds one of `allowed`, the values this implementation honours."""
    if field in hf and hf[field] not in allowed:
        raise ModelError(
            f"{field}: expected {' or '.join(map(repr, allowed))} in the model's config, got {hf[field]!r}"
        )


def head_dim(hf: HFConfig) -> int:
    """Elements per attention head: `head_dim` where given, else hidden_size / num_attention_heads."""
    if hf.get("head_dim"):
        return int(hf["head_dim"])
    hidden_size, num_heads = int(required(hf, "hidden_size")), int(required(hf, "num_attention_heads"))
    if hidden_size % num_heads:
        raise ModelError(f"hidden_size: {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    return hidden_size // num_heads


def layer_windows(hf: HFConfig) -> tuple[int | None, ...]:
    """Attention window of each layer, as Qwen spells it.

    `layer_types` says which layers slide; without it those from `max_window_layers` up do, if `use_sliding_window`.
    """
    num_layers = int(required(hf, "num_hidden_layers"))
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    kinds = hf.get("layer_types")
    if kinds is None:
        first = int(hf.get("max_window_layers", 28))
        return tuple(window if i >= first else None for i in range(num_layers))
    if len(kinds) != num_layers:
        raise ModelError(f"layer_types: expected one for each of {num_layers} layers, got {len(kinds)}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(f"layer_types: expected 'full_attention' or 'sliding_attention', got {kind!r}")
    if window is None and "sliding_attention" in kinds:
        raise ModelError("layer_types: names sliding_attention but sliding_window or use_sliding_window is not set")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
