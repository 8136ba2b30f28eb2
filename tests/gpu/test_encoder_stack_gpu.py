"""Encoders whose layers are one launch against the same model in float32, a layer at a time; needs a Hopper GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models import encoder
from pjengine.models.encoder import EncoderConfig
from pjengine.step_inputs import StepInputs
from tests.kernels.encoder_layers import random_layers, random_rows
from tests.kernels.ragged_cases import relative_error

pytestmark = pytest.mark.gpu

TOKENS, ROWS, VOCABULARY = 16, 8, 50
BFLOAT16_ERROR = 1e-2


@pytest.mark.parametrize(("hidden", "heads", "layers"), [(1024, 16, 4), (768, 12, 6), (384, 12, 6), (512, 8, 3)])
def test_encoder_stack(hidden: int, heads: int, layers: int) -> None:
    config = EncoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_layers=layers,
        max_position_embeddings=TOKENS,
        num_heads=heads,
        mlp_size=4 * hidden,
        type_vocab_size=0,
        layer_norm_eps=1e-12,
    )
    params = {
        "embed": random_rows(VOCABULARY, hidden),
        "position_embed": random_rows(TOKENS, hidden, seed=1),
        "embed_norm": jnp.ones(hidden, jnp.bfloat16),
        "embed_norm_bias": jnp.zeros(hidden, jnp.bfloat16),
        "layers": random_layers(layers, hidden),
    }
    few = encoder.params_for_few(params, config, "mosaic")
    assert few is not None
    few = {**few, "embed": few["embed"].at[0].set(jnp.nan)}  # padding's token
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    run = jax.jit(functools.partial(forward, config=config), static_argnames="backend")
    for lens in ([16], [12], [1], [5, 3, 8], [1] * ROWS, [1, 2, 3, 4, 5], [0, 7, 0, 9]):
        real = sum(lens)
        tokens = np.random.default_rng(real).integers(1, VOCABULARY, TOKENS) * (np.arange(TOKENS) < real)
        positions = np.concatenate([np.arange(n) for n in [*lens, TOKENS - real]])
        starts = np.concatenate([[0], np.cumsum(lens), [real] * (ROWS - len(lens))])
        batch = tuple(x.astype(np.int32) for x in (tokens, positions, starts))
        actual, again = (run(few, *batch, backend="mosaic") for _ in range(2))
        expected = run(wide, *batch, backend="reference")
        assert relative_error(actual[:real].astype(jnp.float32), np.asarray(expected[:real])) < BFLOAT16_ERROR, lens
        assert (actual[:real] == again[:real]).all(), "two runs differ"
    assert not few["packed"].counter.any()


def forward(
    params: dict[str, jax.Array],
    tokens: jax.Array,
    positions: jax.Array,
    starts: jax.Array,
    *,
    config: EncoderConfig,
    backend: str,
) -> jax.Array:
    inputs = StepInputs(
        token_ids=tokens, positions=positions, query_starts=starts, kv_lens=jnp.diff(starts), backend=backend
    )
    return encoder.forward(params, inputs, None, config)[0]
