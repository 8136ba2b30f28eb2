"""`paged_attention`'s reference against a float64 oracle over ragged batches."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.errors import ConfigError, KernelUnavailable
from pjengine.pallas_kernels import paged_attention
from tests.kernels.ragged_cases import oracle_paged, paged_case, random_lens, relative_error

SHAPES = [(4, 4, 16, 16), (9, 3, 64, 16), (14, 2, 64, 32), (8, 1, 80, 64)]  # heads, kv_heads, head_dim, page_size


@functools.partial(jax.jit, static_argnames=("scale", "decode", "window", "chunk", "soft_cap", "backend"))
def run(*arrays: Any, **options: Any) -> Any:
    return paged_attention(*arrays, **options)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_size"), SHAPES)
def test_decode_matches_oracle(heads: int, kv_heads: int, head_dim: int, page_size: int) -> None:
    rng = np.random.default_rng(heads)
    lens = [1, 300, page_size, page_size + 1, 37, 129]
    case = paged_case(
        rng,
        [1] * 6,
        lens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        shared_prefix_pages=2,
    )
    out = run(*case.arrays(), scale=case.scale, decode=True)
    assert relative_error(out, oracle_paged(case)) < 1e-5


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_size"), SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_mixed_matches_oracle(heads: int, kv_heads: int, head_dim: int, page_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    query_lens, kv_lens = random_lens(rng, rows=8, longest=170)
    case = paged_case(
        rng,
        query_lens,
        kv_lens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        padding_rows=2,
        padding_tokens=5,
    )
    out = run(*case.arrays(), scale=case.scale)
    assert np.isfinite(out).all()
    assert relative_error(out[: case.query_starts[-1]], oracle_paged(case)) < 1e-5


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(
    "options", [{"window": 20}, {"window": 1}, {"chunk": 48}, {"soft_cap": 3.0}, {"window": 150, "soft_cap": 5.0}]
)
def test_options_match_oracle(options: dict[str, Any], decode: bool) -> None:
    rng = np.random.default_rng(7)
    query_lens, kv_lens = ([1] * 5, [1, 290, 16, 48, 49]) if decode else ([1, 90, 16, 30], [260, 90, 200, 49])
    case = paged_case(rng, query_lens, kv_lens, heads=6, kv_heads=2, head_dim=32, page_size=16)
    out = run(*case.arrays(), scale=case.scale, decode=decode, **options)
    assert relative_error(out, oracle_paged(case, **options)) < 1e-5


@pytest.mark.parametrize("decode", [True, False])
def test_sinks_join_the_denominator(decode: bool) -> None:
    rng = np.random.default_rng(8)
    query_lens, kv_lens = ([1] * 3, [1, 140, 16]) if decode else ([1, 20, 16], [130, 90, 16])
    case = paged_case(rng, query_lens, kv_lens, heads=6, kv_heads=2, head_dim=32, page_size=16)
    sinks = np.array([-2.0, 0.0, 1.0, 30.0, 3.0, -50.0], np.float32)
    out = run(*case.arrays(), scale=case.scale, decode=decode, sinks=jnp.asarray(sinks))
    assert relative_error(out, oracle_paged(case, sinks=sinks)) < 1e-5


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("scales", [(0.5, 2.0), (np.array([0.5, 0.25], np.float32), np.array([3.0, 1.0], np.float32))])
def test_fp8_cache_is_dequantised(scales: tuple[Any, Any], decode: bool) -> None:
    rng = np.random.default_rng(9)
    query_lens, kv_lens = ([1] * 3, [1, 140, 16]) if decode else ([1, 20, 16], [130, 90, 16])
    case = paged_case(
        rng, query_lens, kv_lens, heads=4, kv_heads=2, head_dim=32, page_size=16, kv_dtype="float8_e4m3fn"
    )
    k_scale, v_scale = (jnp.asarray(s, jnp.float32) for s in scales)
    out = run(*case.arrays(), scale=case.scale, decode=decode, k_scale=k_scale, v_scale=v_scale)
    assert relative_error(out, oracle_paged(case, k_scale=scales[0], v_scale=scales[1])) < 1e-5


def test_rows_without_tokens_give_zeros() -> None:
    case = paged_case(np.random.default_rng(1), [1, 1, 1], [5, 0, 9], heads=2, kv_heads=1, head_dim=16, page_size=16)
    out = run(*case.arrays(), scale=1.0, decode=True)
    assert not np.any(out[1])
    assert np.any(out[0])
    nothing = paged_case(np.random.default_rng(1), [1], [0], heads=2, kv_heads=1, head_dim=16, page_size=16)
    assert not np.any(run(*nothing.arrays(), scale=1.0, decode=True))
    assert not np.any(run(*nothing.arrays(), scale=1.0))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(3)
    case = paged_case(rng, [1, 50, 1, 20], [90, 70, 33, 20], heads=6, kv_heads=2, head_dim=32, page_size=16)
    q, k, v, starts, lens, tables = case.arrays()
    together = run(q, k, v, starts, lens, tables, scale=0.2)
    for r in range(4):
        begin, end = int(starts[r]), int(starts[r + 1])
        alone = run(
            q[begin:end], k, v, jnp.array([0, end - begin], jnp.int32), lens[r : r + 1], tables[r : r + 1], scale=0.2
        )
        np.testing.assert_allclose(together[begin:end], alone, rtol=1e-5, atol=1e-6)


def test_bfloat16_accumulates_in_float32() -> None:
    rng = np.random.default_rng(4)
    case = paged_case(rng, [1, 64], [400, 64], heads=4, kv_heads=2, head_dim=64, page_size=16, dtype="bfloat16")
    out = run(*case.arrays(), scale=case.scale)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out.astype(jnp.float32), oracle_paged(case)) < 4e-3


def test_contradicting_arguments_are_refused() -> None:
    case = paged_case(np.random.default_rng(1), [2, 1], [5, 9], heads=2, kv_heads=1, head_dim=16, page_size=16)
    q, k, v, starts, lens, tables = case.arrays()
    with pytest.raises(ValueError, match="decode: needs one query per row"):
        paged_attention(q, k, v, starts, lens, tables, scale=1.0, decode=True)
    with pytest.raises(ValueError, match="v_pages"):
        paged_attention(q, k, v[:1], starts, lens, tables, scale=1.0)
    with pytest.raises(ValueError, match="query_starts"):
        paged_attention(q, k, v, starts[1:], lens, tables, scale=1.0)
    with pytest.raises(ValueError, match="sinks"):
        paged_attention(q, k, v, starts, lens, tables, scale=1.0, sinks=jnp.zeros(3))
    with pytest.raises(ConfigError, match="attention_backend"):
        paged_attention(q, k, v, starts, lens, tables, scale=1.0, backend="cuda")
    with pytest.raises(KernelUnavailable, match="triton"):
        paged_attention(q, k, v, starts, lens, tables, scale=1.0, backend="triton")
