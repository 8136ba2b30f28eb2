"""`packed_attention`'s reference against a float64 oracle, and its gradient against finite differences."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pjengine.pallas_kernels import packed_attention, packed_attention_qkv
from tests.kernels.ragged_cases import oracle_attention, relative_error


@functools.partial(jax.jit, static_argnames=("scale", "causal", "window", "soft_cap"))
def run(*arrays: Any, **options: Any) -> Any:
    return packed_attention(*arrays, **options)


def batch(lens: list[int], *, heads: int, kv_heads: int, head_dim: int, padding: int = 0, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    tokens = sum(lens) + padding
    q, k, v = (rng.standard_normal((tokens, n, head_dim), np.float32) for n in (heads, kv_heads, kv_heads))
    return q, k, v, np.cumsum([0, *lens]).astype(np.int32)


def oracle(q: Any, k: Any, v: Any, starts: Any, **options: Any) -> Any:
    spans = itertools.pairwise(starts)
    return np.concatenate([oracle_attention(q[a:b], k[a:b], v[a:b], **options) for a, b in spans if b > a])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 32), (6, 2, 64), (7, 1, 16)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "window": 9},
        {"window": 5},
        {"soft_cap": 2.0},
        {"sinks": True},
        {"relative_bias": 4},
        {"relative_bias": 70, "window": 9},
    ],
)
def test_matches_oracle(heads: int, kv_heads: int, head_dim: int, options: dict[str, Any]) -> None:
    q, k, v, starts = batch([3, 1, 0, 100, 17, 60], heads=heads, kv_heads=kv_heads, head_dim=head_dim, padding=6)
    options = {"causal": False, **options}
    if options.pop("sinks", None):
        options["sinks"] = np.linspace(-3, 3, heads).astype(np.float32)
    if reach := options.pop("relative_bias", None):
        options["relative_bias"] = np.random.default_rng(1).normal(size=(heads, 2 * reach + 1)).astype(np.float32)
    out = run(q, k, v, starts, scale=0.3, **options)
    assert np.isfinite(out).all()
    assert relative_error(out[: starts[-1]], oracle(q, k, v, starts, scale=0.3, **options)) < 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_gradient(causal: bool) -> None:
    q, k, v, starts = batch([3, 1, 5], heads=2, kv_heads=1, head_dim=4, padding=2)
    sinks, bias = jnp.array([0.3, -0.2]), jnp.linspace(-1, 1, 10).reshape(2, 5)

    def loss(q: Any, k: Any, v: Any, sinks: Any, bias: Any) -> Any:
        options: dict[str, Any] = {"scale": 0.5, "causal": causal, "sinks": sinks, "relative_bias": bias}
        return packed_attention(q, k, v, starts, **options)[: starts[-1]].sum()

    check_grads(loss, (q, k, v, sinks, bias), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_padding_that_holds_nan_stays_out() -> None:
    q, k, v, starts = batch([5, 4], heads=2, kv_heads=2, head_dim=8, padding=3)
    clean = run(q, k, v, starts, scale=0.5)
    k[9:], v[9:] = np.nan, np.nan
    np.testing.assert_array_equal(run(q, k, v, starts, scale=0.5)[:9], clean[:9])


def test_a_fused_projection_gives_the_same() -> None:
    q, k, v, starts = batch([5, 0, 4], heads=6, kv_heads=2, head_dim=8, padding=3)
    fused = packed_attention_qkv(jnp.concatenate([q, k, v], axis=1), starts, kv_heads=2, scale=0.5)
    np.testing.assert_allclose(fused[:9], run(q, k, v, starts, scale=0.5)[:9], rtol=1e-6, atol=1e-6)


def test_contradicting_arguments_are_refused() -> None:
    q, k, v, starts = batch([5], heads=2, kv_heads=2, head_dim=8)
    with pytest.raises(ValueError, match="k: "):
        packed_attention(q, k[:, :, :4], v[:, :, :4], starts, scale=1.0)
    for shape in ((3, 5), (2, 4)):
        with pytest.raises(ValueError, match=r"relative_bias: expected \[2, 2 \* d \+ 1\]"):
            packed_attention(q, k, v, starts, scale=1.0, relative_bias=jnp.zeros(shape))
    with pytest.raises(ValueError, match="q, k, v"):
        packed_attention(q, k, v[:3], starts, scale=1.0)
    with pytest.raises(ValueError, match="one dtype"):
        packed_attention(q, k.astype(np.float16), v.astype(np.float16), starts, scale=1.0)
    with pytest.raises(ValueError, match="qkv: expected"):
        packed_attention_qkv(jnp.concatenate([q, k, v, k], axis=1)[:, :7], starts, kv_heads=2, scale=1.0)
