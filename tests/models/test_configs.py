"""config.json, as old and new transformers write it, to Config: what is read, what is refused and in which words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pjengine import LLM
from pjengine.errors import ModelError
from pjengine.models import (
    bert,
    distilbert,
    gemma3_text,
    gte,
    llama,
    mistral,
    modernbert,
    mpnet,
    nomic_bert,
    qwen2,
    qwen3,
    roberta,
)
from pjengine.models.relative_positions import relative_buckets
from pjengine.models.rope import LinearScaling, Llama3Scaling, Rope
from pjengine.step_inputs import cache_groups

BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
LLAMA3: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
    ],
)
def test_rope_of_every_spelling(spelling: dict[str, Any]) -> None:
    config = llama.Config.from_hf(BASE | spelling)
    assert config.rope == Rope(16, 5e5, Llama3Scaling(8.0, 1.0, 4.0, 512))


@pytest.mark.parametrize("spelling", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}])
def test_rope_defaults(spelling: dict[str, Any]) -> None:
    assert llama.Config.from_hf(BASE | spelling).rope == Rope(16, 10000.0, None)


def test_linear_rope() -> None:
    config = llama.Config.from_hf(BASE | {"rope_scaling": {"type": "linear", "factor": 4}})
    assert config.rope == Rope(16, 10000.0, LinearScaling(4.0))
    np.testing.assert_allclose(config.rope.frequencies() * 4, Rope(16).frequencies(), rtol=1e-6)


def test_rope_frequencies() -> None:
    """theta ** (-2 i / head_dim), as in the paper."""
    expected = [10000.0 ** (-2 * i / 16) for i in range(8)]
    np.testing.assert_allclose(Rope(16).frequencies(), expected, rtol=1e-6)


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths() -> None:
    plain, scaled = Rope(64, 5e5).frequencies(), Rope(64, 5e5, Llama3Scaling(**LLAMA3)).frequencies()
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 512 / 4, wavelengths > 512 / 1
    assert short.sum() >= 4
    assert long.sum() >= 4
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    assert between.any()
    assert ((plain[between] / 8 < scaled[between]) & (scaled[between] < plain[between])).all()


def test_cos_and_sin_are_float32_of_each_token() -> None:
    positions = np.array([0, 3, 1000], np.int32)
    cos, sin = Rope(16).cos_sin(jnp.asarray(positions))
    assert cos.shape == sin.shape == (3, 8)
    assert cos.dtype == sin.dtype == np.float32
    angles = positions[:, None] * Rope(16).frequencies().astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-4)


def test_llama_2_without_newer_fields() -> None:
    """No num_key_value_heads, head_dim or rope_theta: multi-head attention, hidden_size / heads, 10000."""
    hf = {field: value for field, value in BASE.items() if field != "num_key_value_heads"}
    config = llama.Config.from_hf(hf | {"torch_dtype": "float16", "pretraining_tp": 1})
    assert (config.num_kv_heads, config.head_dim, config.rope.theta) == (4, 16, 10000.0)
    assert (config.rms_norm_eps, config.tie_word_embeddings) == (1e-5, False)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (False,) * 4


def test_llama_biases() -> None:
    config = llama.Config.from_hf(BASE | {"attention_bias": True, "mlp_bias": True})
    layer = llama.param_specs(config)["layers"][0]
    assert {"qkv_bias", "o_bias", "gate_up_bias", "down_bias"} <= set(layer)
    assert layer["qkv_bias"].sources == tuple(f"model.layers.0.self_attn.{m}_proj.bias" for m in "qkv")


def test_tied_embeddings_have_no_lm_head() -> None:
    assert "lm_head" not in llama.param_specs(llama.Config.from_hf(BASE | {"tie_word_embeddings": True}))
    assert "lm_head" in llama.param_specs(llama.Config.from_hf(BASE))


def test_fused_weights() -> None:
    layer = llama.param_specs(llama.Config.from_hf(BASE))["layers"][1]
    assert layer["qkv"].shape == (64, 4 * 16 + 2 * 2 * 16)
    assert layer["gate_up"].shape == (64, 320)
    assert layer["gate_up"].sources == ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, (None,) * 4),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, (None,) * 4),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, (None, None, None, 8)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 9}, (None,) * 4),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None,) * 4),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
            },
            (8, None, None, 8),
        ),
        ({"sliding_window": None, "layer_types": ["full_attention"] * 4}, (None,) * 4),
    ],
)
@pytest.mark.parametrize("module", [qwen2, qwen3])
def test_qwen_windows(module: Any, fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    config = module.Config.from_hf(BASE | fields)
    assert config.windows == windows
    assert tuple(spec.window for spec in module.cache_specs(config)) == windows
    assert len(set(cache_groups(module.cache_specs(config)))) == len(set(windows))


def test_qwen_differ_from_llama_by_bias_and_norms() -> None:
    two, three = qwen2.Config.from_hf(BASE), qwen3.Config.from_hf(BASE)
    assert (two.qkv_bias, two.o_bias, two.qk_norm, two.head_dim) == (True, False, False, 16)
    assert (three.qkv_bias, three.o_bias, three.qk_norm, three.head_dim) == (False, False, True, 128)


@pytest.mark.parametrize(
    ("fields", "window"), [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 8}, 8)]
)
def test_mistral_window(fields: dict[str, Any], window: int | None) -> None:
    assert mistral.Config.from_hf(BASE | fields).windows == (window,) * 4


BERT = {**BASE, "hidden_act": "gelu", "type_vocab_size": 2, "layer_norm_eps": 1e-12}


DISTILBERT = {
    "model_type": "distilbert",
    "activation": "gelu",
    "vocab_size": 256,
    "dim": 64,
    "hidden_dim": 160,
    "n_layers": 4,
    "n_heads": 4,
    "max_position_embeddings": 1024,
}


def test_roberta_counts_positions_from_behind_the_padding_token() -> None:
    config = roberta.Config.from_hf(BERT | {"max_position_embeddings": 514})
    assert (config.position_offset, config.max_position_embeddings) == (2, 512)
    assert roberta.param_specs(config)["position_embed"].shape == (514, 64)
    assert roberta.Config.from_hf(BERT | {"pad_token_id": 0}).position_offset == 1


MODERNBERT = {field: value for field, value in BASE.items() if field != "hidden_act"}
MODERNBERT |= {"model_type": "modernbert", "hidden_activation": "gelu"}
KINDS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    "spelling",
    [
        {"global_attn_every_n_layers": 2, "global_rope_theta": 5e5, "local_rope_theta": 1e3},
        {
            "layer_types": KINDS,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ],
)
def test_modernbert_of_every_spelling(spelling: dict[str, Any]) -> None:
    config = modernbert.Config.from_hf(MODERNBERT | spelling | {"local_attention": 8})
    assert config.windows == (None, 5, None, 5)  # a local layer sees four tokens on each side
    assert (config.global_rope, config.local_rope) == (Rope(16, 5e5), Rope(16, 1e3))


@pytest.mark.parametrize("fields", [{}, {"rope_parameters": {}}, {"rope_parameters": {"full_attention": None}}])
def test_modernbert_defaults(fields: dict[str, Any]) -> None:
    config = modernbert.Config.from_hf(MODERNBERT | fields)
    assert config.windows == (None, 65, 65, None)
    assert (config.global_rope, config.local_rope) == (Rope(16, 160000.0), Rope(16, 10000.0))


def test_modernbert_local_layers_without_a_theta_of_their_own() -> None:
    assert modernbert.Config.from_hf(MODERNBERT | {"local_rope_theta": None}).local_rope == Rope(16, 160000.0)


NOMIC = {
    "model_type": "nomic_bert",
    "activation_function": "swiglu",
    "vocab_size": 256,
    "n_embd": 64,
    "n_head": 4,
    "n_inner": 160,
    "n_layer": 4,
    "n_positions": 8192,
    "layer_norm_epsilon": 1e-12,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "prenorm": False,
    "qkv_proj_bias": False,
    "type_vocab_size": 2,
}


def test_nomic_as_its_authors_write_it() -> None:
    config = nomic_bert.Config.from_hf(NOMIC)
    assert config == nomic_bert.Config.from_hf(
        {field: value for field, value in BASE.items() if field != "hidden_act"}
        | {"max_position_embeddings": 8192, "rope_parameters": {"rope_theta": 1000.0}}
    )
    assert (config.rope, config.num_layers, config.max_position_embeddings) == (Rope(16, 1000.0), 4, 8192)


def test_nomic_that_scales_its_rotation_ends_where_its_training_did() -> None:
    config = nomic_bert.Config.from_hf(NOMIC | {"rotary_scaling_factor": 2, "max_trained_positions": 512})
    assert config.max_position_embeddings == 512


GEMMA = {
    **{field: value for field, value in BASE.items() if field != "hidden_act"},
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "use_bidirectional_attention": True,
    "sliding_window": 512,
    "query_pre_attn_scalar": 256,
}


@pytest.mark.parametrize(
    "spelling",
    [
        {"sliding_window_pattern": 2, "rope_theta": 5e5, "rope_local_base_freq": 1e3},
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e3}},
        },
    ],
)
def test_gemma_of_every_spelling(spelling: dict[str, Any]) -> None:
    config = gemma3_text.Config.from_hf(GEMMA | spelling)
    assert config.windows == (257, None, 257, None)  # 256 tokens on each side
    assert (config.global_rope, config.local_rope, config.scale) == (Rope(16, 5e5), Rope(16, 1e3), 1 / 16)


MPNET = BERT | {"model_type": "mpnet", "relative_attention_num_buckets": 32}


def test_mpnet_buckets() -> None:
    """Eight distances on either side have a bucket each, the farther ones share, from 91 on all of them one."""
    buckets = relative_buckets(32).tolist()
    middle = len(buckets) // 2
    before, after = buckets[:middle][::-1], buckets[middle + 1 :]
    assert buckets[middle] == 0
    assert after == [bucket + 16 for bucket in before]
    assert before[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [before.index(bucket) + 1 for bucket in range(8, 16)] == [8, 12, 16, 23, 32, 46, 64, 91]
    assert before[-1] == before[90] == 15


GTE = BASE | {"hidden_act": "gelu", "model_type": "gte", "rope_theta": 1e5}


@pytest.mark.parametrize(
    ("module", "fields", "message"),
    [
        (llama, {"hidden_act": "gelu"}, "hidden_act: expected 'silu' in the model's config, got 'gelu'"),
        (qwen2, {"is_causal": False}, "is_causal: expected True"),
        (llama, {"vocab_size": None}, "vocab_size: missing"),
        (llama, {"quantization_config": {"quant_method": "awq"}}, "quantization_config: expected None"),
        (llama, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected None or 1.0"),
        (
            llama,
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            "rope_scaling: rope_type 'dynamic' is not supported",
        ),
        (llama, {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: rope_type 'yarn' is not supported"),
        (llama, {"rope_scaling": {"type": "linear"}}, "factor: missing"),
        (llama, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters: one set for all"),
        (llama, {"num_key_value_heads": 3}, "num_key_value_heads: 3 .* num_attention_heads 4"),
        (llama, {"num_attention_heads": 5}, "hidden_size: 64 .* num_attention_heads 5"),
        (qwen2, {"layer_types": ["full_attention"]}, "layer_types: expected one for each of 4 layers, got 1"),
        (qwen2, {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "layer_types: .*'chunked_attention'"),
        (qwen3, {"layer_types": ["sliding_attention"] * 4}, "layer_types: .*sliding_window"),
        (mistral, {"layer_types": ["full_attention"] * 4}, "layer_types: expected None"),
        (bert, {"hidden_act": "relu"}, "hidden_act: expected 'gelu'"),
        (bert, {"position_embedding_type": "relative_key"}, "position_embedding_type: expected None or 'absolute'"),
        (bert, {"is_decoder": True}, "is_decoder: expected False"),
        (bert, {"num_attention_heads": 5}, "hidden_size: 64 .* num_attention_heads 5"),
        (roberta, {"hidden_act": "gelu_new"}, "hidden_act: expected 'gelu'"),
        (roberta, {"pad_token_id": None}, "pad_token_id: missing"),
        (modernbert, {"norm_bias": True}, "norm_bias: expected False"),
        (modernbert, {"hidden_activation": "silu"}, "hidden_activation: expected 'gelu'"),
        (modernbert, {"layer_types": ["full_attention"]}, "layer_types: expected one for each of 4 layers, got 1"),
        (modernbert, {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters: expected a set for each of full_att"),
        (modernbert, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: expected None"),
        (nomic_bert, {"moe_every_n_layers": 2}, "moe_every_n_layers: expected None or 0"),
        (nomic_bert, {"rotary_emb_fraction": 0.5}, "rotary_emb_fraction: expected 1"),
        (nomic_bert, {"qkv_proj_bias": True}, "qkv_proj_bias: expected False"),
        (gemma3_text, {"use_bidirectional_attention": False}, "use_bidirectional_attention: expected True"),
        (gemma3_text, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: expected None"),
        (mpnet, {"relative_attention_num_buckets": 7}, "relative_attention_num_buckets: expected an even number"),
        (gte, {"layer_norm_type": "rms_norm"}, "layer_norm_type: expected 'layer_norm'"),
        (gte, {"logn_attention_scale": True}, "logn_attention_scale: expected False"),
        (gte, {"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.6}}, "mixed_b: expected None"),
        (distilbert, {"activation": "relu"}, "activation: expected 'gelu'"),
        (distilbert, {"n_heads": 5}, "dim: 64 .* n_heads 5"),
        (distilbert, {"hidden_dim": None}, "hidden_dim: missing from the config of this distilbert model"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(module: Any, fields: dict[str, Any], message: str) -> None:
    bases = {bert: BERT, roberta: BERT, distilbert: DISTILBERT, modernbert: MODERNBERT}
    base = (bases | {nomic_bert: NOMIC, gemma3_text: GEMMA, gte: GTE, mpnet: MPNET}).get(module, BASE)
    module.Config.from_hf(base)
    with pytest.raises(ModelError, match=message):
        module.Config.from_hf(base | fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 0),
        ("num_hidden_layers", 0),
        ("vocab_size", -1),
        ("hidden_size", "64"),
        ("intermediate_size", 1.5),
        ("max_position_embeddings", True),
    ],
)
def test_a_damaged_size_is_named(field: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"model_type": "llama", field: value}))
    with pytest.raises(ModelError, match=f"config: {field}: expected an integer of at least 1 .*, got {value!r}"):
        LLM(str(tmp_path), load_format="dummy")
