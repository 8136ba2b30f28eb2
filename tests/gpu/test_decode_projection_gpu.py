"""Decode with rotation and KV write in one kernel against the two it replaces, bit by bit; needs a Hopper GPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels import paged_attention, paged_attention_qkv, rope_write_kv_qkv
from tests.kernels.ragged_cases import PagedCase, paged_case, relative_error

pytestmark = pytest.mark.gpu

# heads, kv_heads, head_dim, page_size: groups of 1 to 16
SHAPES = [
    (32, 8, 128, 64),
    (16, 8, 128, 16),
    (8, 8, 128, 32),
    (28, 4, 128, 64),
    (64, 8, 128, 128),
    (16, 1, 128, 64),
    (9, 3, 64, 16),
    (14, 2, 64, 128),
    (16, 1, 64, 64),
    (8, 4, 256, 16),
]
UNNORMALISED = [(32, 32, 96, 32), (16, 8, 80, 64)]
ROWS, LONGEST, SEEDS = 14, 700, 10
BORDERS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 256, 512]


def projection(rng: np.random.Generator, rows: int, shape: tuple[int, int, int, int], dtype: str) -> tuple[Any, ...]:
    heads, kv_heads, head_dim, _ = shape
    qkv = rng.standard_normal((rows, heads + 2 * kv_heads, head_dim)) * 10 ** rng.uniform(-1, 0, (rows, 1, 1))
    angles = rng.uniform(0, 6, (rows, head_dim // 2))
    return (
        jnp.asarray(qkv, dtype),
        jnp.asarray(np.cos(angles), jnp.float32),
        jnp.asarray(np.sin(angles), jnp.float32),
    )


def norm_weights(head_dim: int, dtype: str) -> dict[str, Any]:
    rng = np.random.default_rng(head_dim)
    return {f"{name}_norm": jnp.asarray(rng.uniform(0.5, 2, head_dim), dtype) for name in ("q", "k")}


def two_kernels(qkv: Any, cos: Any, sin: Any, k: Any, v: Any, slots: Any, *batch: Any, **options: Any) -> Any:
    written = {name: options.pop(name) for name in ("q_norm", "k_norm") if name in options}
    backend = options["backend"]
    q, k, v = rope_write_kv_qkv(qkv, cos, sin, k, v, slots, backend=backend, **written)
    return paged_attention(q, k, v, *batch, **options), k, v


STATIC = ("scale", "decode", "window", "backend")
one = jax.jit(paged_attention_qkv, static_argnames=STATIC, donate_argnums=(3, 4))
two = jax.jit(two_kernels, static_argnames=STATIC, donate_argnums=(3, 4))


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(jax.lax.bitcast_convert_type(x, jnp.uint16))


def make_case(seed: int, lens: list[int], shape: tuple[int, int, int, int], dtype: str, **options: Any) -> PagedCase:
    heads, kv_heads, head_dim, page_size = shape
    return paged_case(
        np.random.default_rng(seed),
        [1] * len(lens),
        lens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        **options,
    )


def check(
    case: PagedCase, shape: tuple[int, int, int, int], seed: int, *, norm: bool = False, window: int | None = None
) -> None:
    """Pages that the call does not write, and the new tokens' places before it does, hold NaN."""
    dtype = case.dtype
    qkv, cos, sin = projection(np.random.default_rng(seed), len(case.kv_lens), shape, dtype)
    norms = norm_weights(shape[2], dtype) if norm else {}
    _, k, v, *batch = case.arrays()
    slots = jnp.asarray(case.last_slots())
    real = slots[slots >= 0]
    k, v = (x.at[real // shape[3], :, real % shape[3]].set(jnp.nan) for x in (k, v))

    def run(op: Any, backend: str = "mosaic", dtype: str = dtype) -> Any:
        wide = {name: weight.astype(dtype) for name, weight in norms.items()}
        pages = (jnp.array(x, dtype, copy=True) for x in (k, v))
        options = {"scale": case.scale, "decode": True, "window": window, "backend": backend}
        return op(qkv.astype(dtype), cos, sin, *pages, slots, *batch, **options, **wide)

    actual, again, expected = run(one), run(one), run(two)
    for name, a, b, c in zip(("out", "k_pages", "v_pages"), actual, expected, again, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b), err_msg=name)
        np.testing.assert_array_equal(bits(a), bits(c), err_msg=f"{name}: two runs differ")
    reference = run(two, "reference", "float32")[0]
    error = 2e-2 if dtype == "bfloat16" else 4e-3
    assert relative_error(actual[0].astype(jnp.float32), np.asarray(reference)) < error


@pytest.mark.parametrize(
    ("shape", "norm"),
    [*[(shape, norm) for shape in SHAPES for norm in (False, True)], *[(shape, False) for shape in UNNORMALISED]],
)
def test_ragged_rows(shape: tuple[int, int, int, int], norm: bool) -> None:
    """Lengths at the borders of pages and blocks, rows without tokens."""
    max_pages = -(-LONGEST // shape[3])
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        lens = [int(n) for n in rng.integers(1, LONGEST, ROWS)]
        lens[: ROWS // 2] = [int(n) for n in rng.choice(BORDERS, ROWS // 2, replace=False)]
        lens[7 + seed % 7] = 0
        case = make_case(seed, lens, shape, "bfloat16", padding_rows=2, pages=1 + ROWS * max_pages, max_pages=max_pages)
        check(case, shape, seed, norm=norm)


@pytest.mark.parametrize("lens", [[1], [5000], [4096], [64] * 200, [1, 9000, 2, 8192, 0, 300], [200] * 256])
@pytest.mark.parametrize("norm", [False, True])
def test_extreme_lengths(lens: list[int], norm: bool) -> None:
    """Rows that many workers share, and workers with many rows."""
    check(make_case(0, lens, SHAPES[0], "bfloat16"), SHAPES[0], 1, norm=norm)


@pytest.mark.parametrize("window", [1, 64, 100])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6]])
def test_windows(shape: tuple[int, int, int, int], window: int) -> None:
    check(make_case(0, [1, 64, 65, 99, 100, 128, 700, 0, 5000], shape, "bfloat16"), shape, 2, window=window)


@pytest.mark.parametrize("norm", [False, True])
def test_float16(norm: bool) -> None:
    check(make_case(0, [1, 64, 65, 99, 0, 128, 700], SHAPES[6], "float16"), SHAPES[6], 3, norm=norm)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6]])
def test_steps_that_follow_one_another(shape: tuple[int, int, int, int]) -> None:
    """Each step reads what those before it wrote, two layers a program: all of them as by two kernels."""
    heads, kv_heads, head_dim, page = shape
    rows, steps = 5, 150
    tables = np.random.default_rng(0).permutation(np.arange(1, 1 + rows * 16)).reshape(rows, 16).astype(np.int32)
    starts, first = jnp.arange(rows + 1, dtype=jnp.int32), np.array([0, 3, 60, 64, 99])

    def layers(op: Any, qkv: Any, cos: Any, sin: Any, pools: Any, slots: Any, lens: Any) -> Any:
        written = []
        for k, v in pools:
            out, k, v = op(
                qkv,
                cos,
                sin,
                k,
                v,
                slots,
                starts,
                lens,
                jnp.asarray(tables),
                scale=head_dim**-0.5,
                decode=True,
                backend="mosaic",
            )
            qkv = qkv.at[:, :heads].add(out)
            written.append((k, v))
        return qkv, written

    runs = {
        name: jax.jit(functools.partial(layers, op), donate_argnums=3)
        for name, op in (("one", paged_attention_qkv), ("two", two_kernels))
    }
    empty = (1 + rows * 16, kv_heads, page, head_dim)
    # What stands in the pages before the first step.
    before = jnp.asarray(np.random.default_rng(1).standard_normal(empty), jnp.bfloat16)
    pools = {name: [tuple(jnp.copy(before) for _ in "kv") for _ in range(2)] for name in runs}
    for step in range(steps):
        at = first + step
        slots = jnp.asarray(tables[np.arange(rows), at // page] * page + at % page, jnp.int32)
        inputs = projection(np.random.default_rng(step), rows, shape, "bfloat16")
        outs = {}
        for name, run in runs.items():
            outs[name], pools[name] = run(*inputs, pools[name], slots, jnp.asarray(at + 1, jnp.int32))
        np.testing.assert_array_equal(bits(outs["one"]), bits(outs["two"]), err_msg=f"step {step}")
    for a, b in zip(jax.tree.leaves(pools["one"]), jax.tree.leaves(pools["two"]), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
