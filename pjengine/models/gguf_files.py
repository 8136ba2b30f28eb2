"""GGUF files as Hugging Face checkpoints: config.json, generation_config.json and tensor names out of llama.cpp's.

Metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; tensor names and the permutation of Q and K:
llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from pjengine.errors import ModelError
from pjengine.models.gguf_format import GGUFHeader, TensorInfo, read_header, read_tensor

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}  # general.architecture -> Hugging Face model_type
_PERMUTES_QK = ("llama",)  # architectures whose Q and K rows the converter reorders for rotary pairs (i, i + 1)

_REQUIRED = {  # config.json field: metadata key, after "<architecture>."
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SAMPLING = {  # generation_config.json field: metadata key
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
_ROPE_FACTORS = "rope_freqs.weight"
# What every converter of Llama 3.1 and later writes; the file keeps only the factors that follow from them.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192


def config_of(header: GGUFHeader) -> dict[str, Any]:
    """The model's config.json. ModelError for an unknown architecture or missing metadata."""
    arch = header.require("general.architecture")
    if arch not in ARCHITECTURES:
        raise ModelError(
            f"{header.path}: general.architecture: {arch!r} is not supported in GGUF; {', '.join(ARCHITECTURES)} are"
        )

    def get(key: str, default: Any = None) -> Any:
        return header.metadata.get(f"{arch}.{key}", default)

    config: dict[str, Any] = {"model_type": ARCHITECTURES[arch], "dtype": "bfloat16", "hidden_act": "silu"}
    config |= {field: header.require(f"{arch}.{key}") for field, key in _REQUIRED.items()}
    config["vocab_size"] = _vocab_size(header)
    _check_layers(header, config["num_hidden_layers"])
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = get("attention.head_count_kv", heads)
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        config[field] = _same_in_all_layers(header, field, config[field])
    config["head_dim"] = get(
        "attention.key_length", get("rope.dimension_count", config["hidden_size"] // config["num_attention_heads"])
    )
    config["rope_theta"] = get("rope.freq_base", 10000.0)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    if arch != "qwen2":  # Qwen2's biases are part of the architecture, not a field of its config
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if get("attention.sliding_window"):
        config["sliding_window"] = get("attention.sliding_window")
    rope_scaling = _rope_scaling(header, arch, config["head_dim"], config["rope_theta"])
    if rope_scaling:
        config["rope_scaling"] = rope_scaling
    for name in ("bos", "eos"):
        token = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            config[f"{name}_token_id"] = token
    return config


def generation_config_of(header: GGUFHeader) -> dict[str, Any]:
    """The model's generation_config.json: end tokens and, where the file has them, recommended sampling parameters."""
    ends = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    config: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(t for t in ends if t is not None))}
    return config | {field: header.metadata[key] for field, key in _SAMPLING.items() if key in header.metadata}


class GGUFTensors:
    """A TensorReader over a .gguf file: Hugging Face names, dequantised, Q and K rows in Hugging Face's order."""

    def __init__(self, path: Path):
        self._header = read_header(path)
        self._permuted_heads = _permuted_heads(self._header)
        self._infos = {hugging_face_name(n): i for n, i in self._header.tensors.items() if n != _ROPE_FACTORS}
        self.where = str(path)
        self.shapes = {name: info.shape for name, info in self._infos.items()}

    def read(self, name: str) -> np.ndarray:
        info = self._infos[name]
        tensor = read_tensor(self._header, info)
        heads = self._heads_to_restore(info)
        return tensor if heads is None else undo_permutation(tensor, heads)

    def _heads_to_restore(self, info: TensorInfo) -> int | None:
        match = re.search(r"\.attn_([qk])\.(?:weight|bias)$", info.name)
        return self._permuted_heads.get(match[1]) if match else None


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names stay."""
    stem, _, suffix = name.rpartition(".")
    if stem in _TENSORS:
        return f"{_TENSORS[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match and match[2] in _LAYER_TENSORS:
        return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.{suffix}"
    return name


def undo_permutation(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a Q or K projection, from llama.cpp's order (rotary pairs side by side) to Hugging Face's (in halves).

    Inverse of `permute` in llama.cpp's convert_hf_to_gguf.py; for weights [heads * head_dim, in] and biases.
    """
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, half, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _permuted_heads(header: GGUFHeader) -> dict[str, int]:
    arch = header.require("general.architecture")
    if arch not in _PERMUTES_QK:
        return {}
    config = config_of(header)
    return {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}


def _check_layers(header: GGUFHeader, count: Any) -> None:
    found = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if count != len(found):
        raise ModelError(f"{header.path}: block_count is {count!r}, but there are tensors of {len(found)} layers")


def _same_in_all_layers(header: GGUFHeader, field: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise ModelError(f"{header.path}: {field}: differs between layers ({value}), which is not supported")
    return value[0]


def _vocab_size(header: GGUFHeader) -> int:
    info = header.tensors.get("token_embd.weight")
    if info is None:
        raise ModelError(
            f"{header.path}: no tensor token_embd.weight: a vocabulary-only file cannot be run; fetch the whole model"
        )
    return info.shape[0]


def _rope_scaling(header: GGUFHeader, arch: str, head_dim: int, theta: float) -> dict[str, Any] | None:
    if _ROPE_FACTORS in header.tensors:
        return _llama3_scaling(header, head_dim, theta)
    kind = header.metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": header.require(f"{arch}.rope.scaling.factor")}
    original = header.metadata.get(f"{arch}.rope.scaling.original_context_length")
    return scaling | ({"original_max_position_embeddings": original} if original else {})


def _llama3_scaling(header: GGUFHeader, head_dim: int, theta: float) -> dict[str, Any]:
    """The Llama 3.1 scaling whose frequency factors the file holds; ModelError where none gives exactly those."""
    found = read_tensor(header, header.tensors[_ROPE_FACTORS]).astype(np.float64)
    factor = float(found.max())
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    kept = np.clip((_LLAMA3_CONTEXT / wavelength - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0, 1)
    expected = 1 / ((1 - kept) / factor + kept)
    if expected.shape != found.shape or not np.allclose(found, expected, rtol=1e-3):
        raise ModelError(
            f"{header.path}: tensor {_ROPE_FACTORS}: rotary factors other than Llama 3.1's are not supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }
