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

from pjengine.pallas_kernels.paged.mosaic_decode import DecodeConfig, decode_plan, paged_decode
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
            decode_plan(kv_lens, spec, config),
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


def test_prefill() -> None:
    """In a process of its own: three warpgroups wait at once, and XLA has a thread for each where NPROC says so."""
    environment = {**os.environ, "NPROC": "8", "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted_prefill"], env=environment, check=True, timeout=300
    )
