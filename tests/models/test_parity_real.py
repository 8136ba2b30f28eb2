"""The two real models against transformers (SmolLM2) and sentence-transformers (MiniLM), in float32."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models import load
from pjengine.models.pooling import pool, unit_length
from pjengine.step_inputs import KVCache, StepInputs, packed_inputs
from tests.helpers import PagedSequences, load_golden, relative_error, split_rows

pytestmark = pytest.mark.real

MARGIN = 1e-3  # of the two highest logits: below it float32's order of summation may decide


@pytest.fixture(scope="module")
def smollm2() -> tuple[ModuleType, Any, Any]:
    return load("smollm2-135m-instruct", dtype="float32")


def test_smollm2_teacher_forced(smollm2: tuple[ModuleType, Any, Any]) -> None:
    """64 tokens of each of 8 chats, fed through a paged cache in chunks of 16."""
    model, params, config = smollm2
    golden, _ = load_golden("smollm2-135m-instruct")
    rows = split_rows(golden["tokens"], golden["starts"])

    @functools.partial(jax.jit, donate_argnums=2)
    def hidden_states(params: Any, inputs: StepInputs, cache: KVCache) -> tuple[jax.Array, KVCache]:
        return model.forward(params, inputs, cache, config)

    sequences = PagedSequences(rows, model.cache_specs(config), "float32")
    hidden = sequences.run(functools.partial(hidden_states, params), chunks=[16] * 8, tokens=128)
    # Token i of a continuation was chosen by the hidden state one place before it.
    first = golden["starts"][:-1] + golden["prompt_lens"] - 1
    chosen = first[:, None] + np.arange(64)
    logits = np.asarray(jax.jit(model.logits, static_argnums=2)(params, jnp.asarray(hidden[chosen.ravel()]), config))
    logits = logits.reshape(8, 64, -1)

    assert relative_error(logits[:, :, golden["columns"]], golden["logits"]) < 1e-4
    assert relative_error(np.take_along_axis(logits, golden["top_ids"], -1), golden["top_logits"]) < 1e-4
    assert relative_error(jax.nn.logsumexp(jnp.asarray(logits), axis=-1), golden["logsumexp"]) < 1e-4
    clear = golden["top_logits"][..., 0] - golden["top_logits"][..., 1] >= MARGIN
    np.testing.assert_array_equal(logits.argmax(-1)[clear], golden["top_ids"][..., 0][clear])


def test_smollm2_greedy_text(smollm2: tuple[ModuleType, Any, Any]) -> None:
    """Each greedy continuation is transformers' up to its first step without a clear margin."""
    model, params, config = smollm2
    golden, _ = load_golden("smollm2-135m-instruct")
    expected = split_rows(golden["tokens"], golden["starts"])
    rows = [row[:length] for row, length in zip(expected, golden["prompt_lens"], strict=True)]

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params: Any, inputs: StepInputs, cache: KVCache) -> tuple[jax.Array, KVCache]:
        hidden, cache = model.forward(params, inputs, cache, config)
        return model.logits(params, hidden[inputs.last_tokens], config).argmax(-1), cache

    sequences = PagedSequences([row + [0] * 64 for row in rows], model.cache_specs(config), "float32")
    spans = [(0, len(row)) for row in rows]
    tokens, decode = 384, False
    for _ in range(64):
        chosen, sequences.cache = step(params, sequences.inputs(spans, tokens, decode=decode), sequences.cache)
        for row, token in zip(rows, np.asarray(chosen).tolist(), strict=True):
            row.append(token)
        sequences.sequences = rows
        spans = [(len(row) - 1, len(row)) for row in rows]
        tokens, decode = len(rows), True

    margins = golden["top_logits"][..., 0] - golden["top_logits"][..., 1]
    for row, want, length, unclear in zip(rows, expected, golden["prompt_lens"], margins < MARGIN, strict=True):
        end = length + (np.argmax(unclear) if unclear.any() else 64)
        assert row[:end] == want[:end]


def test_minilm_embeddings() -> None:
    """32 texts in one packed step: within 1e-4 cosine distance of sentence-transformers' embeddings."""
    model, params, config = load("all-minilm-l6-v2", dtype="float32")
    golden, _ = load_golden("all-minilm-l6-v2")

    @jax.jit
    def embed(params: Any, inputs: StepInputs) -> jax.Array:
        hidden, _ = model.forward(params, inputs, None, config)
        return unit_length(pool(hidden, inputs, "mean"))

    embeddings = np.asarray(embed(params, packed_inputs(split_rows(golden["tokens"], golden["starts"]))))
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), 1, rtol=1e-5)
    assert (1 - (embeddings * golden["embeddings"]).sum(-1)).max() < 1e-4
    assert relative_error(embeddings, golden["embeddings"]) < 1e-4
