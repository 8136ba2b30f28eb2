"""Loading safetensors directories and dummy weights into parameters, and what wrong checkpoints are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pjengine.errors import ConfigError, ModelError
from pjengine.models import llama, load
from pjengine.models.loading import checkpoint_dtype, choose_dtype, load_source, model_of
from pjengine.models.params import is_spec
from pjengine.models.safetensors_files import SafetensorsFiles
from pjengine.models.sources import resolve
from pjengine.step_inputs import packed_inputs
from tests.helpers import GOLDEN, load_golden
from tests.sources.checkpoints import CONFIG, llama_tensors, write_directory

Tensors = dict[str, np.ndarray]


def assert_equal_trees(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_parameters_are_the_checkpoint(tmp_path: Path) -> None:
    tensors = llama_tensors()
    module, params, config = load(str(write_directory(tmp_path, tensors)))
    assert module is llama
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (64, 2, 80)
    specs = module.param_specs(config)

    def check(spec: Any, array: jax.Array) -> None:
        joined = np.concatenate([tensors[name] for name in spec.sources])
        np.testing.assert_array_equal(array, joined.T if spec.transpose else joined)

    jax.tree.map(check, specs, params, is_leaf=is_spec)


def test_shards_load_as_one_file_does(tmp_path: Path) -> None:
    whole = load(str(write_directory(tmp_path / "whole")))[1]
    assert_equal_trees(load(str(write_directory(tmp_path / "shards", shards=3)))[1], whole)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "bert", "xlm-roberta"])
def test_golden_checkpoints(name: str) -> None:
    """Every architecture's checkpoint as transformers writes it: no tensor is missing or left over."""
    load_golden(name)
    module, params, config = load(str(GOLDEN / name))
    shapes = jax.tree.map(lambda spec: spec.shape, module.param_specs(config), is_leaf=is_spec)
    assert jax.tree.map(jnp.shape, params) == shapes


def test_dtypes(tmp_path: Path) -> None:
    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in llama_tensors().items()}
    path = str(write_directory(tmp_path, half, {**CONFIG, "dtype": "bfloat16"}))
    for dtype, expected in (
        ("auto", "float32"),
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
    ):
        params = load(path, dtype=dtype)[1]
        assert {array.dtype.name for array in jax.tree.leaves(params)} == {expected}
        np.testing.assert_array_equal(params["embed"], half["model.embed_tokens.weight"].astype(expected))


def test_auto_dtype_is_the_checkpoints_own_on_a_gpu(tmp_path: Path) -> None:
    source = resolve(str(write_directory(tmp_path, config={**CONFIG, "dtype": "bfloat16"})))
    assert choose_dtype(source, "auto", platform="gpu") == "bfloat16"
    assert choose_dtype(source, "auto", platform="cpu") == "float32"
    without = {key: value for key, value in CONFIG.items() if key != "dtype"}
    half = {name: tensor.astype(np.float16) for name, tensor in llama_tensors().items()}
    assert checkpoint_dtype(resolve(str(write_directory(tmp_path / "half", half, without)))) == "float16"


def test_unknown_dtypes(tmp_path: Path) -> None:
    path = str(write_directory(tmp_path, config={**CONFIG, "dtype": "float8_e4m3fn"}))
    with pytest.raises(ConfigError, match=r"dtype: expected one of auto, float32.*got 'int8'"):
        load(path, dtype="int8")
    with pytest.raises(ModelError, match=r"config: dtype: expected one of float32.*got 'float8_e4m3fn'; set --dtype"):
        checkpoint_dtype(resolve(path))


def test_dummy_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    module, params, config = load(str(tmp_path), load_format="dummy", seed=3)
    assert_equal_trees(load(str(tmp_path), load_format="dummy", seed=3)[1], params)
    other = load(str(tmp_path), load_format="dummy", seed=4)[1]
    assert not np.array_equal(other["embed"], params["embed"])
    hidden, _ = module.forward(params, packed_inputs([[1, 2, 3]]), None, config)
    assert np.isfinite(hidden).all()


def test_shardings_are_kept(tmp_path: Path) -> None:
    source = resolve(str(write_directory(tmp_path)))
    module, config = model_of(source)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = jax.tree.map(lambda _: placed, module.param_specs(config), is_leaf=is_spec)
    params = load_source(source, module, config, "float32", shardings=shardings)
    assert {array.sharding for array in jax.tree.leaves(params)} == {placed}
    assert_equal_trees(params, load(str(tmp_path))[1])


@pytest.mark.parametrize(
    "extra", ["model.layers.0.self_attn.rotary_emb.inv_freq", "embeddings.position_ids", "lm_head.weight"]
)
def test_harmless_leftovers(tmp_path: Path, extra: str) -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    write_directory(tmp_path, {**llama_tensors(tied), extra: np.zeros((80, 64), np.float32)}, tied)
    assert "lm_head" not in load(str(tmp_path))[1]


def test_base_model_saved_without_its_head(tmp_path: Path) -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    tensors = llama_tensors(tied)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    with_prefix = load(str(write_directory(tmp_path / "a", tensors, tied)))[1]
    assert_equal_trees(load(str(write_directory(tmp_path / "b", bare, tied)))[1], with_prefix)


@pytest.mark.parametrize(
    ("name", "prefix", "head"),
    [
        ("bert", "bert", "cls.predictions.bias"),
        ("roberta", "roberta", "lm_head.dense.weight"),
        ("xlm-roberta", "roberta", "lm_head.bias"),
        ("distilbert", "distilbert", "vocab_transform.weight"),
        ("modernbert", "model", "head.dense.weight"),
    ],
)
def test_encoder_saved_with_its_head(tmp_path: Path, name: str, prefix: str, head: str) -> None:
    reader = SafetensorsFiles(GOLDEN / name)
    tensors = {f"{prefix}.{key}": reader.read(key).astype(np.float32) for key in reader.shapes}
    config = json.loads((GOLDEN / name / "config.json").read_text())
    write_directory(tmp_path, {**tensors, head: np.zeros(64, np.float32)}, config)
    assert_equal_trees(load(str(tmp_path), dtype="float32")[1], load(str(GOLDEN / name), dtype="float32")[1])
    write_directory(tmp_path, {**tensors, "adapter.weight": np.zeros((1, 64), np.float32)}, config)
    with pytest.raises(ModelError, match=r"unknown tensors: adapter\.weight"):
        load(str(tmp_path))


def test_dtype_that_cannot_be_read(tmp_path: Path) -> None:
    ints = {name: tensor.astype(np.int8) for name, tensor in llama_tensors().items()}
    with pytest.raises(ModelError, match=r"model\.safetensors: tensor \S+: dtype I8 is not one of F32, BF16, F16, F64"):
        load(str(write_directory(tmp_path, ints)))


def without_norm(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}


def with_stranger(tensors: Tensors) -> Tensors:
    return {**tensors, "model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}


def with_wide_embedding(tensors: Tensors) -> Tensors:
    return {**tensors, "model.embed_tokens.weight": np.zeros((80, 65), np.float32)}


def with_short_key(tensors: Tensors) -> Tensors:
    return {**tensors, "model.layers.1.self_attn.k_proj.weight": np.zeros((16, 64), np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_norm, r"missing tensors: model\.norm\.weight"),
        (with_stranger, r"unknown tensors: model\.layers\.0\.self_attn\.q_proj\.bias"),
        (with_wide_embedding, r"asks for \[80, 64\], found model\.embed_tokens\.weight \[80, 65\]"),
        (
            with_short_key,
            r"asks for \[128, 64\] together, found .*q_proj\.weight \[64, 64\], .*k_proj\.weight \[16, 64\]",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path: Path, change: Callable[[Tensors], Tensors], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(str(write_directory(tmp_path, change(llama_tensors()))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, r"config: model_type: 't5' is not supported; known are bert, .*llama"),
        ({"hidden_act": "relu"}, r"config: hidden_act: expected 'silu'.*got 'relu'"),
        ({"hidden_size": None}, r"config: hidden_size: missing"),
        ({"hidden_size": "wide"}, r"config: .*'wide'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            r"config: rope_scaling: rope_type 'yarn' is not supported",
        ),
    ],
)
def test_configs_that_cannot_be_honoured(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_directory(tmp_path, llama_tensors(), {**CONFIG, **change})
    with pytest.raises(ModelError, match=message):
        load(str(tmp_path))


def test_missing_shard(tmp_path: Path) -> None:
    write_directory(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 of 3 shards are missing: model-00002-of-00003\.safetensors"):
        load(str(tmp_path))


def test_index_that_lists_too_much(tmp_path: Path) -> None:
    write_directory(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"lists tensors that its shards do not hold: model\.ghost"):
        load(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"x": 1}}'])
def test_damaged_index(tmp_path: Path, content: str) -> None:
    write_directory(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json: .*weight_map"):
        load(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    file = write_directory(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a readable safetensors file .*fetch it again"):
        load(str(tmp_path))
