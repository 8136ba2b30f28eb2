"""The encoder's kernel for few tokens, as far as a CPU goes: how weights are packed, and who is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from pjengine.errors import KernelUnavailable
from pjengine.models import encoder
from pjengine.models.encoder import EncoderConfig
from pjengine.models.params import is_spec
from pjengine.pallas_kernels import encoder_stack
from pjengine.pallas_kernels.backends import Target
from pjengine.pallas_kernels.encoder_stack.api import mosaic_refusal
from pjengine.pallas_kernels.encoder_stack.packing import pack_layers
from pjengine.pallas_kernels.specs import EncoderStackSpec
from tests.kernels.encoder_layers import random_layers, random_rows
from tests.kernels.hopper import on_hopper

HIDDEN, HEADS = 512, 8
HEAD_DIM = HIDDEN // HEADS
H200 = Target("gpu", 90, 132, "NVIDIA H200")
BGE_LARGE = EncoderStackSpec(hidden=1024, heads=16, mlp=4096, dtype="bfloat16")


def test_every_weight_is_where_a_lane_looks_for_it() -> None:
    """By the definition of mma.m16n8k16's operands, element by element."""
    (layer,) = random_layers(1, HIDDEN)
    packed = np.asarray(pack_layers([layer], HEADS).weights[0].astype("float32"))
    weights = {name: np.asarray(layer[name].astype("float32")) for name in ("qkv", "o", "up", "down")}
    rng = np.random.default_rng(0)
    for _ in range(3000):
        block, chunk = rng.integers(HIDDEN // 8), rng.integers(12)
        warp, step, group, pair, element = (rng.integers(n) for n in (HEADS, HEAD_DIM // 32, 8, 4, 8))
        row = warp * HEAD_DIM + 32 * step + 8 * pair + element
        column = 8 * block + group
        if chunk < 3:
            expected = weights["qkv"][row, chunk * HIDDEN + column]
        elif chunk == 3:
            # Sums of the product with V: tile j of 8 columns, column n, is the head's dimension n * head_dim / 8 + j.
            # Words 0 to 3 of a lane are columns 2c and 2c + 1 of the tiles 4 step to 4 step + 3.
            tile, n = 4 * step + element // 2, 2 * pair + element % 2
            expected = weights["o"][warp * HEAD_DIM + n * HEAD_DIM // 8 + tile, column]
        elif chunk < 8:
            expected = weights["up"][row, 32 * block + 8 * (chunk - 4) + group]
        else:
            part = warp * 4 * HEAD_DIM + (chunk - 8) * HEAD_DIM
            expected = weights["down"][part + 32 * step + 8 * pair + element, column]
        lane = group * 4 + pair
        place = ((warp * (HEAD_DIM // 32) + step) * 32 + lane) * 8 + element
        assert packed[block, chunk, place] == expected


def test_biases_and_norms() -> None:
    layers = random_layers(2, HIDDEN)
    packed = pack_layers(layers, HEADS)
    assert packed.weights.shape == (2, HIDDEN // 8, 12, 8 * HIDDEN)
    for i, layer in enumerate(layers):
        biases = np.concatenate([layer[f"{name}_bias"] for name in ("qkv", "o", "up", "down")])
        np.testing.assert_array_equal(packed.biases[i], biases)
        norms = [layer[name] for name in ("attn_norm", "attn_norm_bias", "mlp_norm", "mlp_norm_bias")]
        np.testing.assert_array_equal(packed.norms[i], np.stack(norms))
    assert not packed.counter.any()


def test_bge_and_minilm_are_served() -> None:
    assert mosaic_refusal(BGE_LARGE, H200) is None
    assert mosaic_refusal(EncoderStackSpec(384, 12, 1536, "bfloat16"), H200) is None


@pytest.mark.parametrize(
    ("changes", "target", "why"),
    [
        ({}, Target("gpu", 80, 108, "NVIDIA A100"), "compute capability 9.0, got 80"),
        ({}, Target("cpu"), "compute capability 9.0, got None"),
        ({}, dataclasses.replace(H200, cores=114), "needs 128 streaming multiprocessors at once, got 114"),
        ({"dtype": "float32"}, H200, "must be bfloat16, got float32"),
        ({"heads": 8}, H200, "head_dim must be 32 or 64, got 128"),
        ({"hidden": 640, "heads": 10, "mlp": 2560}, H200, "must be 8, 12 or 16, got 10"),
        ({"hidden": 256, "heads": 8, "mlp": 1024}, H200, "others have not run on a GPU, got 256 and 8"),
        ({"mlp": 2048}, H200, "four times as wide as hidden, got 2048 for 1024"),
    ],
)
def test_refusals(changes: dict[str, Any], target: Target, why: str) -> None:
    refusal = mosaic_refusal(dataclasses.replace(BGE_LARGE, **changes), target)
    assert refusal is not None
    assert why in refusal


def test_wrong_arguments_are_named() -> None:
    layers = random_layers(1, HIDDEN)
    packed, x, starts = pack_layers(layers, HEADS), random_rows(16, HIDDEN), jax.numpy.array([0, 3], "int32")
    with pytest.raises(ValueError, match=r"x: expected bfloat16 \[16, 512\], got bfloat16 \[32, 512\]"):
        encoder_stack(random_rows(32, HIDDEN), starts, packed, eps=1e-12)
    with pytest.raises(ValueError, match=r"x: expected bfloat16 .*, got float32"):
        encoder_stack(x.astype("float32"), starts, packed, eps=1e-12)
    with pytest.raises(ValueError, match="query_starts: expected int32"):
        encoder_stack(x, starts.astype("int16"), packed, eps=1e-12)
    with pytest.raises(KernelUnavailable, match=r"encoder_stack: needs compute capability 9\.0"):
        encoder_stack(x, starts, packed, eps=1e-12)
    with pytest.raises(ValueError, match="heads: hidden / heads must be a multiple of 32, got 512 / 32"):
        pack_layers(layers, 32)
    with pytest.raises(ValueError, match=r"up: expected \[512, 2048\], got \[512, 1024\]"):
        pack_layers([{**layers[0], "up": layers[0]["up"][:, :1024]}], HEADS)


CONFIG = EncoderConfig(
    vocab_size=10,
    hidden_size=HIDDEN,
    num_layers=2,
    max_position_embeddings=16,
    num_heads=HEADS,
    mlp_size=4 * HIDDEN,
    type_vocab_size=0,
    layer_norm_eps=1e-12,
)


def params_for_few(config: EncoderConfig = CONFIG) -> Any:
    """Shapes of what the smallest batches get, for shapes of the weights."""
    specs = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, "bfloat16"), encoder.param_specs(config), is_leaf=is_spec
    )
    return jax.eval_shape(lambda params: encoder.params_for_few(params, config, "auto"), specs)


def test_an_h200_gets_the_weights_once_more() -> None:
    with on_hopper():
        found = params_for_few()
        assert params_for_few(dataclasses.replace(CONFIG, relative_buckets=32)) is None
    assert found["packed"].weights.shape == (2, HIDDEN // 8, 12, 8 * HIDDEN)
    assert set(found) == {"embed", "position_embed", "embed_norm", "embed_norm_bias", "packed"}


def test_a_cpu_keeps_the_weights_once() -> None:
    assert params_for_few() is None
