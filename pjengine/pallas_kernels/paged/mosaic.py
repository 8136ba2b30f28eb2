"""`paged_attention` on Hopper: rows of one query go to the split-KV decode kernel, the others to the prefill kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pjengine.pallas_kernels.backends import Target, current_target
from pjengine.pallas_kernels.mosaic_common import HOPPER_SMS
from pjengine.pallas_kernels.paged.mosaic_decode import DecodeConfig, decode_plan, paged_decode
from pjengine.pallas_kernels.paged.mosaic_prefill import PrefillConfig, paged_prefill, prefill_plan
from pjengine.pallas_kernels.specs import AttentionSpec


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    query_starts: jax.Array,
    kv_lens: jax.Array,
    block_tables: jax.Array,
    sinks: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    *,
    spec: AttentionSpec,
    scale: float,
) -> jax.Array:
    """See `pjengine.pallas_kernels.paged_attention`."""
    target = current_target()
    decode = decode_config(spec, target)
    if spec.decode:
        plan = decode_plan(kv_lens, spec, decode)
        return paged_decode(q, k_pages, v_pages, kv_lens, block_tables, plan, spec=spec, scale=scale, config=decode)

    counts = query_starts[1:] - query_starts[:-1]
    items = prefill_plan(query_starts, jnp.where(counts > 1, counts, 0), kv_lens, q.shape[0])
    out = paged_prefill(
        q, k_pages, v_pages, kv_lens, block_tables, items, spec=spec, scale=scale, config=prefill_config(spec, target)
    )
    single_lens = jnp.where(counts == 1, kv_lens, 0)
    plan = decode_plan(single_lens, spec, decode)
    tokens = jnp.minimum(query_starts[:-1], q.shape[0] - 1)
    return paged_decode(
        q, k_pages, v_pages, single_lens, block_tables, plan, tokens, out, spec=spec, scale=scale, config=decode
    )


def decode_config(spec: AttentionSpec, target: Target) -> DecodeConfig:
    """Block sizes for the decode kernel: what fits shared memory with two workers per SM."""
    return DecodeConfig(block=64 * 128 // spec.head_dim, stages=3, workers=2, sms=target.cores or HOPPER_SMS)


def prefill_config(spec: AttentionSpec, target: Target) -> PrefillConfig:
    """Block sizes for the prefill kernel."""
    return PrefillConfig(block=128, stages=2 if spec.head_dim == 128 else 4, sms=target.cores or HOPPER_SMS)
