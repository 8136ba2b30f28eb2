"""The Mosaic kernels themselves on tiny grids on the CPU, in JAX's interpreter (see `interpreted`)."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels import paged_attention_qkv
from pjengine.pallas_kernels.packed.mosaic_short import ShortConfig, short_attention
from pjengine.pallas_kernels.packed.operands import packed_operands
from pjengine.pallas_kernels.packed.plan import packed_plan
from pjengine.pallas_kernels.packed.reference import packed_attention as reference
from pjengine.pallas_kernels.paged.decode_new_token import NewTokens
from pjengine.pallas_kernels.paged.decode_plan import DecodeConfig, decode_plan
from pjengine.pallas_kernels.paged.mosaic_decode import paged_decode, paged_decode_qkv
from pjengine.pallas_kernels.specs import AttentionSpec
from tests.kernels.interpreted import interpreted
from tests.kernels.ragged_cases import oracle_paged, paged_case, relative_error

HEADS, KV_HEADS, HEAD_DIM, PAGE = 2, 1, 64, 32


@pytest.mark.parametrize(
    ("kv_dtype", "options"),
    [("bfloat16", {}), ("float8_e4m3fn", {"window": 90})],
)
def test_decode(kv_dtype: str, options: dict[str, Any]) -> None:
    """Rows of no, one and some blocks; pairs that are cut and pairs that are whole; sinks and scales."""
    rng = np.random.default_rng(0)
    lens = [130, 0, 64]
    case = paged_case(
        rng,
        [1] * len(lens),
        lens,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        page_size=PAGE,
        dtype="bfloat16",
        kv_dtype=kv_dtype,
    )
    spec = AttentionSpec(
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        kv_dtype=kv_dtype,
        page_size=PAGE,
        decode=True,
        sinks=True,
        kv_scales=True,
        **options,
    )
    config = DecodeConfig(block=64, stages=2, workers=1, sms=2)
    q, k, v, _, kv_lens, tables = case.arrays()
    sinks, scale = rng.normal(size=HEADS).astype(np.float32), np.array([1.5], np.float32)
    with interpreted():
        out = paged_decode(
            q,
            k,
            v,
            kv_lens,
            tables,
            decode_plan(kv_lens, tables, spec, config),
            sinks=jnp.asarray(sinks),
            k_scale=jnp.asarray(scale),
            v_scale=jnp.asarray(scale),
            spec=spec,
            scale=case.scale,
            config=config,
        )
        jax.block_until_ready(out)
    expected = oracle_paged(case, sinks=sinks, k_scale=scale, v_scale=scale, **options)
    assert relative_error(out.astype(jnp.float32), expected) < 1e-2


@pytest.mark.parametrize(("norm", "window"), [(True, None), (False, 40)])
def test_decode_of_a_projection(norm: bool, window: int | None) -> None:
    """Last tokens inside and at both ends of blocks, of pairs that are cut and that are whole; all else in the pages
    stays, and what stood in the new tokens' places is never seen: it is NaN."""
    rng = np.random.default_rng(0)
    lens = [130, 0, 64, 1, 65]
    case = paged_case(
        rng,
        [1] * len(lens),
        lens,
        heads=2 * KV_HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        page_size=PAGE,
        dtype="bfloat16",
    )
    slots = jnp.asarray(case.last_slots())
    spec = AttentionSpec(2 * KV_HEADS, KV_HEADS, HEAD_DIM, page_size=PAGE, decode=True, window=window)
    _, k, v, starts, kv_lens, tables = case.arrays()
    qkv = jnp.asarray(rng.standard_normal((len(lens), spec.heads + 2 * KV_HEADS, HEAD_DIM)), jnp.bfloat16)
    angles = jnp.asarray(rng.uniform(0, 6, (len(lens), HEAD_DIM // 2)), jnp.float32)
    weights = tuple(jnp.asarray(rng.uniform(0.5, 2, HEAD_DIM), jnp.bfloat16) for _ in range(2)) if norm else ()
    written = slots[slots >= 0]
    k, v = (x.at[written // PAGE, :, written % PAGE].set(jnp.nan) for x in (k, v))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    batch = (k, v, slots, starts, kv_lens, tables)
    norms: dict[str, Any] = dict(zip(("q_norm", "k_norm"), weights, strict=False))
    expected = paged_attention_qkv(qkv, cos, sin, *batch, scale=case.scale, decode=True, window=window, **norms)
    config = DecodeConfig(block=64, stages=2, workers=1, sms=2)
    with interpreted():
        actual = paged_decode_qkv(
            qkv,
            NewTokens(cos, sin, slots, weights),
            k,
            v,
            kv_lens,
            tables,
            decode_plan(kv_lens, tables, spec, config),
            spec=spec,
            scale=case.scale,
            config=config,
            norm_eps=1e-6 if norm else None,
        )
        jax.block_until_ready(actual)
    assert relative_error(actual[0].astype(jnp.float32), np.asarray(expected[0], np.float32)) < 1e-2
    for a, b in zip(actual[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 9, "soft_cap": 5.0}])
def test_packed_short(options: dict[str, Any]) -> None:
    """Tiles of one and of several blocks, some of them whole, and NaN in the padding."""
    lens = [5, 3, 0, 150, 20, 40, 1]
    starts = np.cumsum([0, *lens]).astype(np.int32)
    real = int(starts[-1])
    spec = AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, **{"causal": False, **options})
    tokens = real + 13
    # The interpreter's copies do not reach past an array, as a GPU's do: one more tile of it.
    values = np.random.default_rng(0).standard_normal((tokens + 64, HEADS + 2 * KV_HEADS, HEAD_DIM), np.float32)
    qkv = jnp.asarray(values, jnp.bfloat16)
    plan = packed_plan(jnp.asarray(starts), tokens, spec, rows=64, block=64)
    with interpreted():
        operands = packed_operands((qkv.at[real:].set(jnp.nan),), spec)
        config = ShortConfig(block=64, warpgroups=2, sms=3)
        out = short_attention(operands, plan, spec=spec, scale=0.3, config=config)
    out = np.asarray(out, np.float32)[:tokens]
    expected = reference((qkv.astype(jnp.float32),), jnp.asarray(starts), None, spec=spec, scale=0.3)
    assert np.isfinite(out).all()
    assert relative_error(out[:real], np.asarray(expected)[:real]) < 1e-2


@pytest.mark.parametrize("kernel", ["prefill", "gated", "qkv", "packed"])
def test_three_warpgroups(kernel: str) -> None:
    """In a process of its own: three or more warpgroups wait at once; XLA has threads for them where NPROC says so."""
    environment = {**os.environ, "NPROC": "8", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    subprocess.run(
        [sys.executable, "-m", f"tests.kernels.interpreted_{kernel}"], env=environment, check=True, timeout=300
    )
