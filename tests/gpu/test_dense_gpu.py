"""GPU kernels that know no sequences, products and norms, against the float32 reference; need a Hopper GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models.layers import linear, linear_swiglu
from pjengine.pallas_kernels import (
    Projection,
    layer_norm,
    qkv_product,
    qkv_product_paged,
    rms_norm,
    rope_qkv,
    rope_write_kv_qkv,
    serves_gated_product,
)
from tests.kernels.ragged_cases import relative_error

pytestmark = pytest.mark.gpu

MLPS = [(4096, 14336), (896, 4864), (576, 1536), (64, 128)]  # hidden, mlp
BFLOAT16_ERROR = 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("tokens", "hidden", "mlp"),
    [
        *((tokens, *mlp) for tokens in (1024, 1032, 1400, 2048, 4096) for mlp in MLPS),
        *((tokens, 4096, 14336) for tokens in (40, 64, 72, 128, 200, 256)),
        (128, 8192, 28672),
    ],
)
def test_linear_swiglu(tokens: int, hidden: int, mlp: int, dtype: str) -> None:
    """Whole and partial tiles, the last round of tiles full and not, and gates far below zero."""
    keys = jax.random.split(jax.random.key(tokens + hidden), 2)
    x = (4 * jax.random.normal(keys[0], (tokens, hidden), jnp.float32)).astype(dtype)
    weight = (jax.random.normal(keys[1], (hidden, 2 * mlp), jnp.float32) * hidden**-0.5).astype(dtype)
    weight = weight.at[:, 0].multiply(40)
    assert serves_gated_product(x, weight)
    product = jax.jit(linear_swiglu, static_argnames="backend")
    actual, again = (product(x, weight, None, backend="auto") for _ in range(2))
    wide = (a.astype(jnp.float32) for a in (x, weight))
    expected = product(*wide, None, backend="reference")
    assert relative_error(actual.astype(jnp.float32), np.asarray(expected)) < BFLOAT16_ERROR
    assert jnp.isfinite(actual).all()
    assert (actual == again).all(), "two runs differ"


QKVS = [  # hidden, heads, KV heads, head_dim, norms, bias
    (1024, 16, 8, 128, True, False),
    (4096, 32, 8, 128, False, False),
    (512, 5, 1, 128, True, True),  # an odd count of blocks of 128 columns
    (896, 14, 2, 64, False, True),
    (768, 12, 12, 64, True, False),
    (64, 8, 4, 128, False, False),  # one step
]


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(("tokens", "dtype"), [(1928, "bfloat16"), (5000, "bfloat16"), (4096, "float16")])
@pytest.mark.parametrize("shape", QKVS)
def test_qkv_product(shape: tuple[int, int, int, int, bool, bool], tokens: int, paged: bool, dtype: str) -> None:
    """Whole and partial tiles; tokens without a slot and pages in any order, what is beside them untouched."""
    hidden, heads, kv_heads, head_dim, norm, biased = shape
    keys = jax.random.split(jax.random.key(tokens + hidden), 9)
    width, page_size = (heads + 2 * kv_heads) * head_dim, 32
    x = jax.random.normal(keys[0], (tokens, hidden)).astype(dtype)
    weight = (2 * jax.random.normal(keys[1], (hidden, width)) * hidden**-0.5).astype(dtype)
    bias = jax.random.normal(keys[2], (width,)).astype(dtype) if biased else None
    q_norm, k_norm = (1 + jax.random.normal(key, (head_dim,)).astype(dtype) if norm else None for key in keys[3:5])
    turns = jax.random.uniform(keys[5], (tokens, head_dim // 2), maxval=7.0)
    rotation = (jnp.cos(turns), jnp.sin(turns))
    pool = (tokens // page_size + 5, kv_heads, page_size, head_dim)
    k_pages, v_pages = (jax.random.normal(key, pool).astype(dtype) for key in keys[6:8])
    slots = jax.random.permutation(keys[8], pool[0] * page_size)[:tokens]
    slots = jnp.where(jnp.arange(tokens) % 7 == 3, -1, slots)
    projection = Projection(
        weight=weight, bias=bias, kv_heads=kv_heads, head_dim=head_dim, q_norm=q_norm, k_norm=k_norm, eps=1e-6
    )

    def fused(x: jax.Array) -> tuple[jax.Array, ...]:
        if paged:
            return qkv_product_paged(x, projection, *rotation, k_pages, v_pages, slots)
        return (qkv_product(x, projection, *rotation),)

    def reference(x: jax.Array) -> tuple[jax.Array, ...]:
        wide: list[Any] = [None if a is None else a.astype(jnp.float32) for a in (weight, bias, q_norm, k_norm)]
        qkv = linear(x, *wide[:2]).reshape(tokens, -1, head_dim)
        norms: dict[str, Any] = {"q_norm": wide[2], "k_norm": wide[3], "eps": 1e-6, "backend": "reference"}
        if paged:
            return rope_write_kv_qkv(qkv, *rotation, k_pages, v_pages, slots, **norms)
        return (rope_qkv(qkv, *rotation, kv_heads=kv_heads, **norms),)

    jitted = jax.jit(fused)
    actual, again = (jitted(x) for _ in range(2))
    expected = jax.jit(reference)(x.astype(jnp.float32))
    for a, b, right in zip(actual, again, expected, strict=True):
        assert relative_error(a.astype(jnp.float32), np.asarray(right, np.float32)) < BFLOAT16_ERROR
        assert (a == b).all(), "two runs differ"
    written = np.zeros(pool[0] * page_size, bool)
    written[np.asarray(slots[slots >= 0])] = True
    beside = ~written.reshape(-1, 1, page_size, 1)
    for got, before in zip(actual[1:], (k_pages, v_pages), strict=False):
        assert np.where(beside, got == before, True).all(), "a slot that no token has was written"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "hidden"), [(2048, 1024), (2051, 768), (8192, 1024), (3001, 256)])
def test_norms_of_many_rows(rows: int, hidden: int, dtype: str) -> None:
    keys = jax.random.split(jax.random.key(rows + hidden), 4)
    scale = jnp.exp(2 * jax.random.normal(keys[0], (rows, 1)))
    x = (scale * (1 + jax.random.normal(keys[1], (rows, hidden)))).astype(dtype)
    weight, bias = (jax.random.normal(key, (hidden,)).astype(dtype) for key in keys[2:])

    def norms(x: jax.Array, weight: jax.Array, bias: jax.Array, backend: str) -> tuple[jax.Array, ...]:
        plain, shifted = (layer_norm(x, weight, b, 1e-6, backend=backend) for b in (None, bias))
        return rms_norm(x, weight, 1e-6, backend=backend), plain, shifted

    jitted = jax.jit(norms, static_argnames="backend")
    actual, again = (jitted(x, weight, bias, "auto") for _ in range(2))
    expected = jitted(*(a.astype(jnp.float32) for a in (x, weight, bias)), "reference")
    for a, b, right in zip(actual, again, expected, strict=True):
        assert relative_error(a.astype(jnp.float32), np.asarray(right)) < BFLOAT16_ERROR
        assert (a == b).all(), "two runs differ"
