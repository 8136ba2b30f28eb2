"""The Triton backend against the float32 reference over random ragged batches; needs a GPU and jax-triton."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels import packed_attention
from tests.gpu.test_kernels_gpu import check, decode_case, mixed_case, paged
from tests.kernels.ragged_cases import relative_error

pytest.importorskip("jax_triton")
pytestmark = pytest.mark.gpu

# heads, kv_heads, head_dim, page_size
SHAPES = [(32, 8, 128, 64), (9, 3, 64, 16), (14, 2, 80, 128), (16, 1, 96, 32), (8, 4, 256, 16)]
SEEDS = 8


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_paged(shape: tuple[int, int, int, int], decode: bool) -> None:
    for seed in range(SEEDS):
        check((decode_case if decode else mixed_case)(seed, *shape), decode=decode, backend="triton")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("decode", [True, False])
def test_dtypes(dtype: str, decode: bool) -> None:
    for seed in range(3):
        case = (decode_case if decode else mixed_case)(seed, *SHAPES[1], dtype=dtype)
        check(case, decode=decode, backend="triton", error={"float16": 2e-3, "float32": 1e-5}[dtype])


@pytest.mark.parametrize("options", [{"window": 100}, {"chunk": 128}, {"soft_cap": 5.0}, {"sinks": True}])
@pytest.mark.parametrize("decode", [True, False])
def test_options(options: dict[str, Any], decode: bool) -> None:
    if "sinks" in options:
        options = {"sinks": jnp.linspace(-2, 6, SHAPES[0][0])}
    for seed in range(3):
        check((decode_case if decode else mixed_case)(seed, *SHAPES[0]), decode=decode, backend="triton", **options)


@pytest.mark.parametrize("decode", [True, False])
def test_float8_cache(decode: bool) -> None:
    for seed in range(3):
        case = (decode_case if decode else mixed_case)(seed, *SHAPES[0], kv_dtype="float8_e4m3fn")
        scales = {"k_scale": jnp.linspace(0.5, 2, 8), "v_scale": jnp.float32(3)}
        actual = paged(*case.arrays(), scale=case.scale, decode=decode, backend="triton", **scales)
        q, *others = case.arrays()
        expected = paged(q.astype(jnp.float32), *others, scale=case.scale, decode=decode, backend="reference", **scales)
        real = int(case.query_starts[-1])
        assert relative_error(actual[:real].astype(jnp.float32), np.asarray(expected[:real])) < 1e-2


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((16, 16, 64), {}),
        ((12, 12, 32), {"window": 50}),
        ((8, 2, 128), {"causal": True}),
        ((8, 8, 80), {"soft_cap": 5.0}),
        ((12, 12, 64), {"relative_bias": 128}),
    ],
)
def test_packed(shape: tuple[int, int, int], options: dict[str, Any]) -> None:
    run = jax.jit(packed_attention, static_argnames=("scale", "causal", "window", "soft_cap", "backend"))
    heads, kv_heads, head_dim = shape
    if reach := options.get("relative_bias"):
        options = {"relative_bias": jax.random.normal(jax.random.key(0), (heads, 2 * reach + 1))}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        lens = rng.integers(0, [20, 600][seed % 2], 40 if seed % 2 == 0 else 4)
        starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        tokens = [900, 2500][seed % 2]
        real = int(starts[-1])
        poison = np.where(np.arange(tokens) < real, 0, np.nan)[:, None, None]
        q, k, v = (
            jnp.asarray(rng.standard_normal((tokens, n, head_dim)) + poison, jnp.bfloat16)
            for n in (heads, kv_heads, kv_heads)
        )
        actual = run(q, k, v, starts, scale=0.2, backend="triton", **options)
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        expected = run(*wide, starts, scale=0.2, backend="reference", **options)
        assert relative_error(actual[:real].astype(jnp.float32), np.asarray(expected[:real])) < 1e-2
        assert jnp.isfinite(actual).all()
