"""Random checkpoints against transformers' float32 outputs: every architecture, prefill whole and in chunks, decode."""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models import heads, load, resolve
from pjengine.models.tasks import head_of
from pjengine.step_inputs import KVCache, StepInputs, packed_inputs
from tests.helpers import GOLDEN, PagedSequences, load_golden, relative_error, split_rows

DECODERS = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")
EMBEDDERS = (
    "bert",
    "distilbert",
    "gemma3_text",
    "gte",
    "modernbert",
    "mpnet",
    "new",
    "nomic_bert",
    "qwen3-embedding",
    "roberta",
    "xlm-roberta",
)
CLASSIFIERS = (
    "bert-classifier",
    "distilbert-classifier",
    "gte-classifier",
    "modernbert-classifier",
    "mpnet-classifier",
    "qwen3-classifier",
    "roberta-classifier",
    "xlm-roberta-classifier",
)
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}

every_decoder = pytest.mark.parametrize("name", DECODERS)
every_embedder = pytest.mark.parametrize("name", EMBEDDERS)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


@functools.cache
def loaded(name: str, dtype: str) -> tuple[ModuleType, Any, Any]:
    return load(str(GOLDEN / name), dtype=dtype)


def golden_inputs(golden: dict[str, np.ndarray]) -> StepInputs:
    """The whole sequences, with their segments where there are some."""
    inputs = packed_inputs(split_rows(golden["tokens"], golden["starts"]))
    if "token_types" in golden:
        inputs = dataclasses.replace(inputs, token_types=jnp.asarray(golden["token_types"]))
    return inputs


@functools.cache
def logits_step(name: str, dtype: str) -> Any:
    """Logits of all tokens of a step, compiled once per shape; the cache is donated."""
    model, params, config = loaded(name, dtype)

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params: Any, inputs: StepInputs, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        hidden, cache = model.forward(params, inputs, cache, config)
        return model.logits(params, hidden, config), cache

    return functools.partial(step, params)


def error_in_steps(name: str, dtype: str, chunks: list[int], tokens: int, *, decode: bool = False) -> float:
    golden, _ = load_golden(name)
    model, _, config = loaded(name, dtype)
    sequences = PagedSequences(split_rows(golden["tokens"], golden["starts"]), model.cache_specs(config), dtype)
    logits = sequences.run(logits_step(name, dtype), chunks, tokens, decode=decode)
    assert logits.dtype == np.float32
    return relative_error(logits, golden["logits"])


@every_dtype
@every_decoder
def test_without_cache(name: str, dtype: str) -> None:
    golden, _ = load_golden(name)
    logits, cache = logits_step(name, dtype)(packed_inputs(split_rows(golden["tokens"], golden["starts"])), None)
    assert cache is None
    assert logits.dtype == jnp.float32
    assert relative_error(logits, golden["logits"]) < TOLERANCE[dtype]


@every_dtype
@every_decoder
def test_prefill_in_one_piece(name: str, dtype: str) -> None:
    assert error_in_steps(name, dtype, chunks=[64] * 5, tokens=144) < TOLERANCE[dtype]


@every_dtype
@every_decoder
def test_prefill_in_chunks(name: str, dtype: str) -> None:
    """Rows advance by different amounts, one of them token by token, and end at different steps."""
    assert error_in_steps(name, dtype, chunks=[4, 3, 7, 1, 17], tokens=144) < TOLERANCE[dtype]


@every_dtype
@every_decoder
def test_decode_step_by_step(name: str, dtype: str) -> None:
    assert error_in_steps(name, dtype, chunks=[1] * 5, tokens=5, decode=True) < TOLERANCE[dtype]


@every_decoder
def test_donated_cache_is_written_in_place(name: str) -> None:
    golden, _ = load_golden(name)
    model, params, config = loaded(name, "float32")
    sequences = PagedSequences(split_rows(golden["tokens"], golden["starts"]), model.cache_specs(config), "float32")
    forward = jax.jit(model.forward, static_argnames="config", donate_argnames="cache")
    inputs = sequences.inputs([(0, 1)] * 5, 5, decode=True)
    analysis = forward.lower(params, inputs, sequences.cache, config=config).compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(sequences.cache))
    assert analysis is not None
    assert analysis.alias_size_in_bytes == size


@every_dtype
@every_embedder
def test_embedder(name: str, dtype: str) -> None:
    golden, _ = load_golden(name)
    model, params, config = loaded(name, dtype)
    inputs = golden_inputs(golden)
    hidden, _ = jax.jit(model.forward, static_argnames="config")(params, inputs, None, config=config)
    assert hidden.dtype == dtype
    assert relative_error(hidden.astype(jnp.float32), golden["hidden"]) < TOLERANCE[dtype]


@every_dtype
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier(name: str, dtype: str) -> None:
    golden, _ = load_golden(name)
    model, params, config = loaded(name, dtype)
    head = head_of(resolve(str(GOLDEN / name)), model, config)
    assert head is not None
    assert (head.task, len(head.labels)) == ("classify", golden["logits"].shape[1])

    @jax.jit
    def logits(params: Any, inputs: StepInputs) -> jax.Array:
        hidden, _ = model.forward(params, inputs, None, config)
        return heads.apply(head, params, hidden, inputs)

    assert relative_error(logits(params, golden_inputs(golden)), golden["logits"]) < TOLERANCE[dtype]
