"""The prefill kernel in JAX's interpreter against the oracle; `test_interpreted` runs it as a process of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.pallas_kernels.paged.mosaic_prefill import PrefillConfig, paged_prefill, prefill_plan
from pjengine.pallas_kernels.specs import AttentionSpec
from tests.kernels.interpreted import interpreted
from tests.kernels.ragged_cases import oracle_paged, paged_case, relative_error

HEADS, KV_HEADS, HEAD_DIM, PAGE = 2, 1, 64, 32
PADDING = 144  # tokens: the interpreter refuses copies that reach past an array, which TMA cuts off


def check(query_lens: list[int], kv_lens: list[int], *, window: int | None = None, **fields: Any) -> None:
    """One batch; all items on one SM, so that tiles of queries and blocks of keys follow one another."""
    rng = np.random.default_rng(0)
    case = paged_case(
        rng,
        query_lens,
        kv_lens,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        page_size=PAGE,
        dtype="bfloat16",
        padding_tokens=PADDING,
    )
    spec = AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, page_size=PAGE, window=window)
    config = PrefillConfig(stages=2, sms=1, **fields)
    q, k, v, starts, lens, tables = case.arrays()
    plan = prefill_plan(starts, starts[1:] - starts[:-1], lens, q.shape[0])
    with interpreted():
        out = paged_prefill(q, k, v, lens, tables, plan, starts[-1:], spec=spec, scale=case.scale, config=config)
        jax.block_until_ready(out)
    error = relative_error(out[: starts[-1]].astype(jnp.float32), oracle_paged(case, window=window))
    if not error < 1e-2:
        raise AssertionError(f"queries {query_lens} of {kv_lens} tokens, {fields}: relative error {error}")
    if out[starts[-1] :].any():
        raise AssertionError("tokens that no row owns are not zeros")


if __name__ == "__main__":
    check([5, 150, 3, 1], [5, 200, 0, 70], block=64, query_stages=2)  # several rows in a tile, one without KV tokens
    check([256, 64], [256, 100], block=128, query_stages=1)  # whole tiles: half a block that no query sees
    check([150], [200], block=64, query_stages=2, window=70)
