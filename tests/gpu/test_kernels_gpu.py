"""GPU kernels of attention, rotation and KV writes against the float32 reference over random ragged batches; need a
Hopper GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels import (
    packed_attention,
    packed_attention_qkv,
    paged_attention,
    rope_qkv,
    rope_write_kv,
    rope_write_kv_qkv,
)
from tests.kernels.ragged_cases import PagedCase, paged_case, random_lens, relative_error

pytestmark = pytest.mark.gpu

# heads, kv_heads, head_dim, page_size: Llama 3.1 8B, SmolLM2 135M, Qwen2 0.5B, Gemma 2 2B, Phi-3, and others
SHAPES = [
    (32, 8, 128, 64),
    (32, 8, 128, 16),
    (9, 3, 64, 16),
    (14, 2, 64, 128),
    (16, 1, 64, 64),
    (8, 4, 256, 16),
    (32, 32, 96, 32),
    (10, 2, 80, 128),
]
BFLOAT16_ERROR = 1e-2
FLOAT8_ERROR = 3e-2
ROWS, TOKENS, LONGEST = 12, 1024, 700
SEEDS = 20  # batches per compiled shape: a compile costs seconds, a batch milliseconds

paged = jax.jit(paged_attention, static_argnames=("scale", "decode", "window", "chunk", "soft_cap", "backend"))


def in_float32(case: PagedCase) -> tuple[Any, ...]:
    return tuple(x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in case.arrays())


def check(case: PagedCase, *, backend: str = "mosaic", error: float = BFLOAT16_ERROR, **options: Any) -> None:
    actual = paged(*case.arrays(), scale=case.scale, backend=backend, **options)
    again = paged(*case.arrays(), scale=case.scale, backend=backend, **options)
    expected = paged(*in_float32(case), scale=case.scale, backend="reference", **options)
    real = int(case.query_starts[-1])
    assert relative_error(actual[:real].astype(jnp.float32), np.asarray(expected[:real])) < error
    assert jnp.isfinite(actual).all()
    assert (actual == again).all(), "two runs differ"


def decode_case(seed: int, heads: int, kv_heads: int, head_dim: int, page_size: int, **options: Any) -> PagedCase:
    rng = np.random.default_rng(seed)
    lens = [int(n) for n in rng.integers(1, LONGEST, ROWS)]
    lens[seed % ROWS] = 1
    lens[(seed + 5) % ROWS] = 0
    max_pages = -(-LONGEST // page_size)
    return paged_case(
        rng,
        [1] * ROWS,
        lens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        pages=1 + ROWS * max_pages,
        max_pages=max_pages,
        shared_prefix_pages=seed % 3,
        **{"dtype": "bfloat16", **options},
    )


def mixed_case(seed: int, heads: int, kv_heads: int, head_dim: int, page_size: int, **options: Any) -> PagedCase:
    rng = np.random.default_rng(seed)
    query_lens, kv_lens = random_lens(rng, ROWS - seed % 3, LONGEST)
    while sum(query_lens) > TOKENS:
        query_lens[int(np.argmax(query_lens))] //= 2
    max_pages = -(-LONGEST // page_size)
    return paged_case(
        rng,
        query_lens,
        kv_lens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        padding_rows=seed % 3,
        padding_tokens=TOKENS - sum(query_lens),
        pages=1 + ROWS * max_pages,
        max_pages=max_pages,
        shared_prefix_pages=seed % 3,
        **{"dtype": "bfloat16", **options},
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_decode(shape: tuple[int, int, int, int]) -> None:
    for seed in range(SEEDS):
        check(decode_case(seed, *shape), decode=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_mixed(shape: tuple[int, int, int, int]) -> None:
    for seed in range(SEEDS):
        check(mixed_case(seed, *shape))


@pytest.mark.parametrize("shape", [SHAPES[0], *SHAPES[3:]])
@pytest.mark.parametrize("decode", [True, False])
def test_float8_cache_with_scales(shape: tuple[int, int, int, int], decode: bool) -> None:
    for seed in range(SEEDS // 2):
        case = (decode_case if decode else mixed_case)(seed, *shape, kv_dtype="float8_e4m3fn")
        rng = np.random.default_rng(seed)
        k_scale, v_scale = (jnp.asarray(rng.uniform(0.5, 2, shape[1]), jnp.float32) for _ in range(2))
        check(case, decode=decode, error=FLOAT8_ERROR, k_scale=k_scale, v_scale=v_scale)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]])
@pytest.mark.parametrize("decode", [True, False])
def test_sinks(shape: tuple[int, int, int, int], decode: bool) -> None:
    for seed in range(SEEDS // 4):
        sinks = jnp.asarray(np.random.default_rng(seed).normal(2, 2, shape[0]), jnp.float32)
        check((decode_case if decode else mixed_case)(seed, *shape), decode=decode, sinks=sinks)


@pytest.mark.parametrize("options", [{"window": 100}, {"chunk": 128}, {"soft_cap": 5.0}])
@pytest.mark.parametrize("decode", [True, False])
def test_options(options: dict[str, Any], decode: bool) -> None:
    for seed in range(3):
        case = (decode_case if decode else mixed_case)(seed, *SHAPES[0])
        check(case, decode=decode, **options)


@pytest.mark.parametrize("decode", [True, False])
def test_float16(decode: bool) -> None:
    case = (decode_case if decode else mixed_case)(1, *SHAPES[2], dtype="float16")
    check(case, decode=decode, error=2e-3)


@pytest.mark.parametrize("lens", [[5000], [1], [64] * 200, [1, 9000, 2, 300]])
def test_decode_of_extreme_lengths(lens: list[int]) -> None:
    rng = np.random.default_rng(0)
    case = paged_case(rng, [1] * len(lens), lens, heads=32, kv_heads=8, head_dim=128, page_size=64, dtype="bfloat16")
    check(case, decode=True)


@pytest.mark.parametrize("padding_rows", [0, 2])
@pytest.mark.parametrize(("tokens", "kv"), [(300, 300), (129, 400), (64, 64), (1, 1), (1, 700), (1, 0), (2049, 2049)])
def test_one_prompt_alone(tokens: int, kv: int, padding_rows: int) -> None:
    """Token counts that are no multiple of a tile, no decode rows beside them, with and without a second kernel."""
    rng = np.random.default_rng(0)
    case = paged_case(
        rng,
        [tokens],
        [kv],
        heads=8,
        kv_heads=2,
        head_dim=128,
        page_size=64,
        dtype="bfloat16",
        padding_rows=padding_rows,
        padding_tokens=5,
    )
    check(case)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 16, 64), (12, 12, 32), (8, 2, 128)])
@pytest.mark.parametrize("causal", [False, True])
def test_packed(heads: int, kv_heads: int, head_dim: int, causal: bool) -> None:
    run = jax.jit(packed_attention, static_argnames=("scale", "causal", "backend"))
    # Made for the kernel for short ones, the last two for the one for long ones.
    batches = [(0, 20, 40), (0, 20, 40), (0, 600, 4), (300, 1500, 4), (300, 1500, 4)]
    for seed, (low, high, count) in enumerate(batches):
        rng = np.random.default_rng(seed)
        lens = [int(n) for n in rng.integers(low, high, count)]
        starts = np.cumsum([0, *lens]).astype(np.int32)
        tokens = int(starts[-1]) + 37
        q, k, v = (
            jnp.asarray(rng.standard_normal((tokens, n, head_dim)), jnp.bfloat16) for n in (heads, kv_heads, kv_heads)
        )
        actual = run(q, k, v, starts, scale=0.2, causal=causal, backend="mosaic")
        float32 = (x.astype(jnp.float32) for x in (q, k, v))
        expected = run(*float32, starts, scale=0.2, causal=causal, backend="reference")
        assert relative_error(actual[: starts[-1]].astype(jnp.float32), np.asarray(expected[: starts[-1]])) < 1e-2
        assert jnp.isfinite(actual).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 65}, {"soft_cap": 5.0}])
@pytest.mark.parametrize("rows", [300, 6])
def test_packed_fused(rows: int, options: dict[str, Any], dtype: str) -> None:
    """A fused projection with NaN in its padding, in both kernels, whatever the lengths."""
    run = jax.jit(
        packed_attention_qkv, static_argnames=("kv_heads", "scale", "causal", "window", "soft_cap", "backend")
    )
    lens = np.array([3, 200, 1, 0, 70, 64, 8, 300, 5, 5, 5, 90] if rows > 12 else [1512, 300, 0, 1, 1130, 64])
    starts = np.cumsum([0, *lens, *[0] * (rows - len(lens))]).astype(np.int32)
    real = int(starts[-1])
    qkv = jnp.asarray(np.random.default_rng(0).standard_normal((real + 70, 8 + 2 * 4, 64)), dtype)
    expected = run(qkv.astype(jnp.float32), starts, kv_heads=4, scale=0.125, backend="reference", **options)
    poisoned = qkv.at[real:].set(jnp.nan)
    actual, again = (run(poisoned, starts, kv_heads=4, scale=0.125, backend="mosaic", **options) for _ in range(2))
    error = BFLOAT16_ERROR if dtype == "bfloat16" else 2e-3
    assert relative_error(actual[:real].astype(jnp.float32), np.asarray(expected[:real])) < error
    assert jnp.isfinite(actual).all()
    assert (actual == again).all(), "two runs differ"


@pytest.mark.parametrize("tokens", [1, 64, 1000, 3000])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "kv_dtype"),
    [(32, 8, 128, 64, "bfloat16"), (9, 3, 64, 16, "bfloat16"), (32, 8, 128, 64, "float8_e4m3fn")],
)
def test_rope_write_kv(tokens: int, heads: int, kv_heads: int, head_dim: int, page_size: int, kv_dtype: str) -> None:
    """q, k and v are slices of one projection, as a model makes them; the pools are donated."""
    rng = np.random.default_rng(tokens)
    pages = tokens // page_size + 4
    slots = rng.permutation(np.arange(page_size, pages * page_size))[:tokens].astype(np.int32)
    slots[1::7] = -1
    width = (heads + 2 * kv_heads) * head_dim
    qkv = jnp.asarray(rng.standard_normal((tokens, width)), jnp.bfloat16)
    angles = rng.uniform(0, 6, (tokens, head_dim // 2))
    cos, sin = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    start = jnp.asarray(rng.standard_normal((2, pages, kv_heads, page_size, head_dim)), kv_dtype)

    @functools.partial(jax.jit, static_argnames="backend", donate_argnums=(3, 4))
    def write(qkv: Any, cos: Any, sin: Any, k_pages: Any, v_pages: Any, backend: str) -> Any:
        parts = jnp.split(qkv, [heads * head_dim, (heads + kv_heads) * head_dim], axis=1)
        q, k, v = (x.reshape(tokens, -1, head_dim) for x in parts)
        return rope_write_kv(q, k, v, cos, sin, k_pages, v_pages, jnp.asarray(slots), backend=backend)

    actual = write(qkv, cos, sin, *(jnp.copy(x) for x in start), backend="mosaic")
    expected = write(qkv, cos, sin, *(jnp.copy(x) for x in start), backend="reference")
    for name, a, b in zip(("q", "k_pages", "v_pages"), actual, expected, strict=True):
        np.testing.assert_array_equal(
            np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)), err_msg=name
        )


@pytest.mark.parametrize("tokens", [1, 64, 1000, 3000])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size"),
    [(32, 8, 128, 64), (14, 2, 64, 16), (32, 8, 80, 32), (8, 4, 256, 16)],
)
def test_rope_write_kv_of_a_fused_projection(
    tokens: int, heads: int, kv_heads: int, head_dim: int, page_size: int
) -> None:
    """Bit-equal but for the order in which products are added: a unit in the last place of a bfloat16."""
    rng = np.random.default_rng(tokens)
    pages = tokens // page_size + 4
    slots = rng.permutation(np.arange(page_size, pages * page_size))[:tokens].astype(np.int32)
    slots[1::7] = -1
    qkv = jnp.asarray(rng.standard_normal((tokens, heads + 2 * kv_heads, head_dim)), jnp.bfloat16)
    angles = rng.uniform(0, 6, (tokens, head_dim // 2))
    cos, sin = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    start = jnp.asarray(rng.standard_normal((2, pages, kv_heads, page_size, head_dim)), jnp.bfloat16)
    write = jax.jit(rope_write_kv_qkv, static_argnames="backend", donate_argnums=(3, 4))
    actual, expected = (
        write(qkv, cos, sin, *(jnp.copy(x) for x in start), jnp.asarray(slots), backend=backend)
        for backend in ("mosaic", "reference")
    )
    for name, a, b in zip(("q", "k_pages", "v_pages"), actual, expected, strict=True):
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=2**-7 if name != "v_pages" else 0, atol=1e-6, err_msg=name)


def norm_weights(head_dim: int, dtype: str) -> dict[str, Any]:
    rng = np.random.default_rng(head_dim)
    return {f"{name}_norm": jnp.asarray(rng.uniform(0.5, 2, head_dim), dtype) for name in ("q", "k")}


def uneven_projection(tokens: int, all_heads: int, head_dim: int, dtype: str) -> tuple[Any, Any, Any]:
    """A projection whose heads differ in size by orders of magnitude, and the angles of its tokens."""
    rng = np.random.default_rng(tokens)
    qkv = rng.standard_normal((tokens, all_heads, head_dim)) * 10 ** rng.uniform(-2, 2, (tokens, all_heads, 1))
    angles = rng.uniform(0, 6, (tokens, head_dim // 2))
    return (
        jnp.asarray(qkv, dtype),
        jnp.asarray(np.cos(angles), jnp.float32),
        jnp.asarray(np.sin(angles), jnp.float32),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [1, 63, 1000, 3001])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 128), (14, 2, 64), (8, 4, 256), (32, 8, 80)])
def test_rope_write_kv_of_a_projection_with_norms(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: str
) -> None:
    """Against the reference in float32; pages that are not written hold NaN and keep it."""
    rng = np.random.default_rng(tokens)
    qkv, cos, sin = uneven_projection(tokens, heads + 2 * kv_heads, head_dim, dtype)
    norms, pages = norm_weights(head_dim, dtype), tokens // 16 + 4
    slots = rng.permutation(np.arange(16, pages * 16))[:tokens].astype(np.int32)
    slots[1::7] = -1
    write = jax.jit(rope_write_kv_qkv, static_argnames="backend", donate_argnums=(3, 4))

    def run(dtype: str, backend: str) -> Any:
        pools = (jnp.full((pages, kv_heads, 16, head_dim), jnp.nan, dtype) for _ in range(2))
        weights = {name: weight.astype(dtype) for name, weight in norms.items()}
        return write(qkv.astype(dtype), cos, sin, *pools, jnp.asarray(slots), backend=backend, **weights)

    error = BFLOAT16_ERROR if dtype == "bfloat16" else 2e-3
    for name, a, b in zip(("q", "k_pages", "v_pages"), run(dtype, "mosaic"), run("float32", "reference"), strict=True):
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=name)
        assert relative_error(jnp.nan_to_num(a), np.nan_to_num(b)) < (error if name != "v_pages" else 1e-9), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("tokens", [1, 63, 1000, 3001])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 128), (14, 2, 64), (12, 12, 32)])
def test_rope_qkv(tokens: int, heads: int, kv_heads: int, head_dim: int, norm: bool, dtype: str) -> None:
    """Against the reference in float32; v stays as it is, NaN too, and so does a projection that is not donated."""
    qkv, cos, sin = uneven_projection(tokens, heads + 2 * kv_heads, head_dim, dtype)
    qkv = qkv.at[:, heads + kv_heads :, 1].set(jnp.nan)
    norms = norm_weights(head_dim, dtype) if norm else {}
    wide = {name: weight.astype(jnp.float32) for name, weight in norms.items()}
    rotate = jax.jit(rope_qkv, static_argnames=("kv_heads", "backend"))
    before = np.asarray(qkv.astype(jnp.float32))
    actual, again = (rotate(qkv, cos, sin, kv_heads=kv_heads, backend="mosaic", **norms) for _ in range(2))
    expected = rotate(qkv.astype(jnp.float32), cos, sin, kv_heads=kv_heads, backend="reference", **wide)
    turned, end = np.asarray(actual.astype(jnp.float32)), heads + kv_heads
    np.testing.assert_array_equal(np.asarray(qkv.astype(jnp.float32)), before)
    np.testing.assert_array_equal(turned, np.asarray(again.astype(jnp.float32)))
    np.testing.assert_array_equal(turned[:, end:], before[:, end:])
    error = BFLOAT16_ERROR if dtype == "bfloat16" else 2e-3
    assert relative_error(turned[:, :end], np.asarray(expected[:, :end])) < error


@pytest.mark.parametrize("rows", [300, 6])
def test_rope_qkv_and_attention_of_its_result(rows: int) -> None:
    """As a causal embedder does it, over ragged sequences, with NaN in the padding."""
    lens = np.array([3, 200, 1, 0, 70, 64, 8, 300, 5, 5, 5, 90] if rows > 12 else [1512, 300, 0, 1, 1130, 64])
    starts = jnp.asarray(np.cumsum([0, *lens, *[0] * (rows - len(lens))]), jnp.int32)
    real = int(starts[-1])
    qkv, cos, sin = uneven_projection(real + 70, 16 + 2 * 8, 128, "bfloat16")
    norms = norm_weights(128, "bfloat16")

    @functools.partial(jax.jit, static_argnames="backend")
    def attend(qkv: Any, norms: Any, backend: str) -> Any:
        turned = rope_qkv(qkv, cos, sin, kv_heads=8, backend=backend, **norms)
        return packed_attention_qkv(turned, starts, kv_heads=8, scale=128**-0.5, causal=True, backend=backend)

    wide = {name: weight.astype(jnp.float32) for name, weight in norms.items()}
    expected = attend(qkv.astype(jnp.float32), wide, "reference")
    actual = attend(qkv.at[real:].set(jnp.nan), norms, "mosaic")
    assert relative_error(actual[:real].astype(jnp.float32), np.asarray(expected[:real])) < BFLOAT16_ERROR
    assert jnp.isfinite(actual).all()
