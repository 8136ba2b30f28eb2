"""Random checkpoints against transformers' float32 outputs: every architecture, prefill whole and in chunks, decode."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models import load
from pjengine.models.pooling import pool
from pjengine.step_inputs import KVCache, StepInputs, packed_inputs
from tests.helpers import GOLDEN, PagedSequences, load_golden, relative_error, split_rows

DECODERS = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")
EMBEDDERS = ("bert", "distilbert", "modernbert", "qwen3-embedding", "roberta", "xlm-roberta")
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}

every_decoder = pytest.mark.parametrize("name", DECODERS)
every_embedder = pytest.mark.parametrize("name", EMBEDDERS)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


@functools.cache
def loaded(name: str, dtype: str) -> tuple[ModuleType, Any, Any]:
    return load(str(GOLDEN / name), dtype=dtype)


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
    inputs = packed_inputs(split_rows(golden["tokens"], golden["starts"]))
    if "token_types" in golden:
        inputs = dataclasses.replace(inputs, token_types=jnp.asarray(golden["token_types"]))
    hidden, _ = jax.jit(model.forward, static_argnames="config")(params, inputs, None, config=config)
    assert hidden.dtype == dtype
    assert relative_error(hidden.astype(jnp.float32), golden["hidden"]) < TOLERANCE[dtype]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", ["mean", "cls", "last"])
def test_pooling_of_a_padded_step(mode: str, normalize: bool) -> None:
    """Rows without tokens and tokens without a row change nothing and stay finite."""
    golden, _ = load_golden("bert")
    rows = [golden["hidden"][a:b] for a, b in itertools.pairwise(golden["starts"])]
    ends = [len(golden["hidden"])] * 3
    inputs = StepInputs(
        token_ids=jnp.zeros(160, jnp.int32),
        positions=jnp.zeros(160, jnp.int32),
        query_starts=jnp.asarray([*golden["starts"], *ends], jnp.int32),
        kv_lens=jnp.asarray([*map(len, rows), 0, 0, 0], jnp.int32),
    )
    hidden = np.full((160, golden["hidden"].shape[1]), 1e6, np.float32)
    hidden[: ends[0]] = golden["hidden"]
    pooled = np.asarray(pool(jnp.asarray(hidden), inputs, mode, normalize))
    assert pooled.shape == (8, hidden.shape[1])
    assert np.isfinite(pooled).all()
    expected = np.stack([{"mean": row.mean(0), "cls": row[0], "last": row[-1]}[mode] for row in rows])
    if normalize:
        expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(pooled[:5], expected, rtol=1e-5, atol=1e-6)


def test_pooling_names_an_unknown_mode() -> None:
    hidden = jnp.zeros((3, 4))
    with pytest.raises(ValueError, match="mode: expected one of mean, cls, last, got 'max'"):
        pool(hidden, packed_inputs([[1, 2, 3]]), "max", False)
