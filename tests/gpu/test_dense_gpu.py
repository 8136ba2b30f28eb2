"""GPU kernels that know no sequences, products and norms, against the float32 reference; need a Hopper GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models.layers import linear_swiglu
from pjengine.pallas_kernels import layer_norm, rms_norm, serves_gated_product
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
