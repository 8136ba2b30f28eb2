"""`paged_attention` on Hopper: rows of one query go to the split-KV decode kernel, the others to the prefill kernel.

A batch of a single row is the prefill kernel's whatever its length: a launch that finds nothing to do costs 2.6 µs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pjengine.pallas_kernels.backends import Target, current_target
from pjengine.pallas_kernels.flash import TILE
from pjengine.pallas_kernels.paged.decode_new_token import NewTokens
from pjengine.pallas_kernels.paged.decode_plan import DecodeConfig, decode_plan
from pjengine.pallas_kernels.paged.mosaic_decode import paged_decode, paged_decode_qkv
from pjengine.pallas_kernels.paged.mosaic_prefill import PrefillConfig, paged_prefill, prefill_plan
from pjengine.pallas_kernels.specs import AttentionSpec
from pjengine.pallas_kernels.tuning import tuned

SHARED_BYTES = 225 * 1024  # per SM, less what barriers take
BLOCK_BYTES = 16 * 1024
DECODE_RING_BYTES = 192 * 1024
MAX_STAGES = 6
WHOLE_TOKENS = 256  # of a row, up to which one worker reads it all


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
    decode: DecodeConfig | None = None,
    prefill: PrefillConfig | None = None,
) -> jax.Array:
    """See `pjengine.pallas_kernels.paged_attention`. decode, prefill: instead of the tuned configs."""
    target = current_target()
    if spec.kv_scales:
        k_scale, v_scale = (_per_head(x, spec.kv_heads) for x in (k_scale, v_scale))
    decode = decode or decode_config(spec, target)
    if spec.decode:
        plan = decode_plan(kv_lens, block_tables, spec, decode)
        return paged_decode(
            q,
            k_pages,
            v_pages,
            kv_lens,
            block_tables,
            plan,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
            spec=spec,
            scale=scale,
            config=decode,
        )

    counts = query_starts[1:] - query_starts[:-1]
    alone = len(counts) == 1
    items = prefill_plan(query_starts, counts if alone else jnp.where(counts > 1, counts, 0), kv_lens, q.shape[0])
    out = paged_prefill(
        q,
        k_pages,
        v_pages,
        kv_lens,
        block_tables,
        items,
        query_starts[-1:],
        sinks,
        k_scale,
        v_scale,
        spec=spec,
        scale=scale,
        config=prefill or prefill_config(spec, target),
    )
    if alone:
        return out
    single_lens = jnp.where(counts == 1, jnp.maximum(kv_lens, 0), -1)
    plan = decode_plan(single_lens, block_tables, spec, decode)
    tokens = jnp.minimum(query_starts[:-1], q.shape[0] - 1)
    return paged_decode(
        q,
        k_pages,
        v_pages,
        single_lens,
        block_tables,
        plan,
        tokens,
        out,
        sinks,
        k_scale,
        v_scale,
        spec=spec,
        scale=scale,
        config=decode,
    )


def paged_attention_qkv(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    write_slots: jax.Array,
    kv_lens: jax.Array,
    block_tables: jax.Array,
    norms: tuple[jax.Array, ...],
    *,
    spec: AttentionSpec,
    scale: float,
    norm_eps: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pjengine.pallas_kernels.paged_attention_qkv`; what `fused_refusal` does not refuse. norms: q's and k's."""
    config = fused_config(decode_config(spec, current_target()), spec)
    new = NewTokens(cos, sin, write_slots, norms)
    plan = decode_plan(kv_lens, block_tables, spec, config)
    return paged_decode_qkv(
        qkv,
        new,
        k_pages,
        v_pages,
        kv_lens,
        block_tables,
        plan,
        spec=spec,
        scale=scale,
        config=config,
        norm_eps=norm_eps,
    )


def decode_config(spec: AttentionSpec, target: Target) -> DecodeConfig:
    """Block sizes for the decode kernel: blocks of about 16 KiB, as many in flight as fit shared memory."""
    token = spec.head_dim * jnp.dtype(spec.kv_dtype).itemsize
    block = 128 if token * 128 <= BLOCK_BYTES else 64
    workers = 2 if token * 64 <= BLOCK_BYTES else 1
    stages = min(MAX_STAGES, DECODE_RING_BYTES // (2 * workers * block * token))
    heuristic = DecodeConfig(
        block=block,
        stages=stages,
        workers=workers,
        sms=target.sms,
        whole_blocks=WHOLE_TOKENS // block,
    )
    return tuned("mosaic decode", spec, target, heuristic)


def fused_config(config: DecodeConfig, spec: AttentionSpec) -> DecodeConfig:
    """The same for a kernel whose copying warpgroups rotate too: with the registers that this takes.

    The computing ones are left with what holds a combine's loads in flight: more where groups are large.
    """
    copy = 96 if spec.group * spec.head_dim <= 512 or config.workers == 1 else 80
    # Those of four warpgroups have 128 a thread between them.
    compute = config.compute_registers if config.workers == 1 else 256 - copy
    return dataclasses.replace(config, copy_registers=copy, compute_registers=compute)


def prefill_config(spec: AttentionSpec, target: Target) -> PrefillConfig:
    """Block sizes for the prefill kernel: registers bound the block, shared memory the blocks in flight."""
    block = 128 if spec.head_dim <= 128 else 64
    query_stages = 2 if spec.head_dim <= 128 else 1
    token = spec.head_dim * jnp.dtype(spec.dtype).itemsize
    room = SHARED_BYTES - query_stages * TILE * token
    if spec.kv_dtype != spec.dtype:
        room -= 2 * block * spec.head_dim * jnp.dtype(spec.kv_dtype).itemsize
    stages = min(MAX_STAGES, room // (2 * block * token))
    sms = target.sms
    heuristic = PrefillConfig(block=block, stages=stages, query_stages=query_stages, sms=sms)
    return tuned("mosaic prefill", spec, target, heuristic)


def _per_head(scale: jax.Array | None, kv_heads: int) -> jax.Array:
    return jnp.broadcast_to(jnp.float32(1) if scale is None else scale.astype(jnp.float32), (kv_heads,))
