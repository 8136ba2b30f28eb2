"""Every model module exports the contract: a new model is a file, a registry row and a row here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pjengine.errors import ModelError
from pjengine.models import registry
from pjengine.models.params import ParamSpec, init_params, is_spec
from pjengine.step_inputs import CacheSpec, packed_inputs
from tests.helpers import GOLDEN

ENCODERS = {
    "bert",
    "distilbert",
    "gemma3_text",
    "gte",
    "modernbert",
    "mpnet",
    "new",
    "nomic_bert",
    "roberta",
    "xlm-roberta",
}

every_model = pytest.mark.parametrize("model_type", registry.MODEL_TYPES)


def golden_config(model_type: str) -> Any:
    hf = json.loads((GOLDEN / model_type / "config.json").read_text())
    assert hf["model_type"] == model_type
    return registry.get(model_type).Config.from_hf(hf)


def test_no_file_without_its_row() -> None:
    files = Path(registry.__file__).parent.glob("*.py")
    models = {file.stem for file in files if "\nclass Config" in file.read_text()}
    assert models == {model_type.replace("-", "_") for model_type in registry.MODEL_TYPES}


@every_model
def test_config(model_type: str) -> None:
    config = golden_config(model_type)
    assert (config.vocab_size, config.hidden_size, config.num_layers, config.max_position_embeddings) == (
        256,
        64,
        3,
        256,
    )
    assert hash(config) == hash(golden_config(model_type))
    assert config == golden_config(model_type)
    assert config != dataclasses.replace(config, vocab_size=257)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 257


@every_model
def test_param_specs(model_type: str) -> None:
    """A tree of ParamSpecs, one list entry per layer, no checkpoint tensor used twice."""
    config = golden_config(model_type)
    specs = registry.get(model_type).param_specs(config)
    leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    assert all(isinstance(leaf, ParamSpec) for leaf in leaves)
    assert len(specs["layers"]) == config.num_layers
    sources = [source for leaf in leaves for source in leaf.sources]
    assert len(sources) == len(set(sources))


@every_model
def test_cache_specs(model_type: str) -> None:
    model, config = registry.get(model_type), golden_config(model_type)
    specs = model.cache_specs(config)
    assert all(isinstance(spec, CacheSpec) for spec in specs)
    assert len(specs) == (0 if model_type in ENCODERS else config.num_layers)


@every_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_keeps_the_dtype_of_its_params(model_type: str, dtype: str) -> None:
    model, config = registry.get(model_type), golden_config(model_type)
    params = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype or dtype), model.param_specs(config), is_leaf=is_spec
    )
    hidden, cache = jax.eval_shape(lambda p: model.forward(p, packed_inputs([[1, 2], [3]]), None, config), params)
    assert (hidden.shape, hidden.dtype, cache) == ((3, config.hidden_size), jnp.dtype(dtype), None)
    assert hasattr(model, "logits") == (model_type not in ENCODERS)
    if model_type not in ENCODERS:
        logits = jax.eval_shape(lambda p, h: model.logits(p, h, config), params, hidden)
        assert (logits.shape, logits.dtype) == ((3, config.vocab_size), jnp.float32)


@every_model
def test_float32_products_are_not_tf32(model_type: str) -> None:
    """A GPU multiplies float32 in TF32 unless each product asks for more."""
    model, config = registry.get(model_type), golden_config(model_type)
    params = init_params(model.param_specs(config), "float32")

    def outputs(params: Any) -> jax.Array:
        hidden, _ = model.forward(params, packed_inputs([[1, 2], [3]]), None, config)
        return hidden if model_type in ENCODERS else model.logits(params, hidden, config)

    products = [line for line in jax.jit(outputs).lower(params).as_text().splitlines() if "dot_general" in line]
    assert len(products) >= 4
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_gradients_agree_with_finite_differences(model_type: str) -> None:
    model, config = registry.get(model_type), golden_config(model_type)
    params = init_params(model.param_specs(config), "float32", seed=1)
    target = jax.random.normal(jax.random.key(2), (5, config.hidden_size))

    @jax.jit
    def loss(params: Any) -> jax.Array:
        hidden, _ = model.forward(params, packed_inputs([[1, 2, 3], [4, 5]], backend="reference"), None, config)
        return (hidden * target).sum()

    gradients = jax.jit(jax.grad(loss))(params)
    length = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
    up, down = (jax.tree.map(lambda p, g, s=s: p + s / length * g, params, gradients) for s in (1e-3, -1e-3))
    assert (loss(up) - loss(down)) / 2e-3 == pytest.approx(float(length), rel=1e-2)


@pytest.mark.parametrize("model_type", ["gpt2", "layers", "xlm_roberta", "", "os"])
def test_unknown_model_type(model_type: str) -> None:
    with pytest.raises(ModelError, match=r"model_type: .* is not supported; known are bert, .*qwen2"):
        registry.get(model_type)
