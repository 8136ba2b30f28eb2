"""The packed kernel for long sequences in JAX's interpreter; `test_interpreted` runs it as a process of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.pallas_kernels.packed.mosaic_long import LongConfig, long_attention
from pjengine.pallas_kernels.packed.operands import packed_operands
from pjengine.pallas_kernels.packed.plan import packed_plan
from pjengine.pallas_kernels.packed.reference import packed_attention as reference
from pjengine.pallas_kernels.specs import AttentionSpec
from tests.kernels.interpreted import interpreted
from tests.kernels.ragged_cases import relative_error

HEADS, KV_HEADS, HEAD_DIM = 2, 1, 64


def check(lens: list[int], config: LongConfig, **options: Any) -> None:
    """One batch with NaN in its padding."""
    starts = np.cumsum([0, *lens]).astype(np.int32)
    real = int(starts[-1])
    tokens = real + 77
    spec = AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, **{"causal": False, **options})
    # The interpreter's copies do not reach past an array, as a GPU's do: one more tile of it.
    shape = (tokens + config.rows, HEADS + 2 * KV_HEADS, HEAD_DIM)
    qkv = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), jnp.bfloat16)
    plan = packed_plan(jnp.asarray(starts), tokens, spec, rows=config.rows, block=config.block, parts=config.warpgroups)
    with interpreted():
        operands = packed_operands((qkv.at[real:].set(jnp.nan),), spec)
        out = long_attention(operands, plan, spec=spec, scale=0.3, config=config)
        jax.block_until_ready(out)
    values = np.asarray(out, np.float32)[:tokens]
    expected = reference((qkv.astype(jnp.float32),), jnp.asarray(starts), None, spec=spec, scale=0.3)
    if not np.isfinite(values).all():
        raise AssertionError(f"{lens}, {config}: not all is finite")
    error = relative_error(values[:real], np.asarray(expected)[:real])
    if not error < 1e-2:
        raise AssertionError(f"{lens}, {config}, {options}: relative error {error}")


if __name__ == "__main__":
    free = LongConfig(block=64, stages=3, sms=2, warpgroups=4)
    # Parts of several sequences, parts that skip blocks, tiles that end in padding and tiles of nothing else.
    check([5, 3, 0, 150, 20, 40, 1, 260], free)
    check([300, 90], free, window=70)
    turns = LongConfig(block=128, stages=2, sms=1, warpgroups=2, turns=True)
    check([5, 0, 150, 1, 200], turns, causal=True, soft_cap=20.0)
    check([150, 330], turns)
