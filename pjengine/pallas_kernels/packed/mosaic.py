"""Packed attention on Hopper, in Pallas Mosaic GPU: one kernel for short sequences, one for long ones."""

from __future__ import annotations

import jax

from pjengine.pallas_kernels.backends import TILE_ROWS, current_target
from pjengine.pallas_kernels.packed.mosaic_long import LongConfig, long_attention, long_config
from pjengine.pallas_kernels.packed.mosaic_short import ShortConfig, fitted, short_attention, short_config
from pjengine.pallas_kernels.packed.operands import packed_operands
from pjengine.pallas_kernels.packed.plan import packed_plan, tile_bound
from pjengine.pallas_kernels.packed.support import LONG
from pjengine.pallas_kernels.specs import AttentionSpec
from pjengine.pallas_kernels.tuning import tuned


def packed_attention(
    arrays: tuple[jax.Array, ...],
    query_starts: jax.Array,
    sinks: jax.Array | None,
    *,
    spec: AttentionSpec,
    scale: float,
    short: ShortConfig | None = None,
    long: LongConfig | None = None,
) -> jax.Array:
    """See `pjengine.pallas_kernels.packed_attention`. arrays: (q, k, v) or (qkv,); short or long: choose that kernel,
    with this config.

    Both kernels serve any lengths; which is quicker is told by the shapes alone, tokens per sequence.
    """
    tokens, sequences = arrays[0].shape[0], max(1, query_starts.shape[0] - 1)
    target = current_target()
    sms = target.sms
    operands = packed_operands(arrays, spec)
    if long is None and (short is not None or tokens // sequences < LONG):
        short = short or tuned("mosaic packed, short", spec, target, short_config(spec, sms))
        plan = packed_plan(query_starts, tokens, spec, rows=TILE_ROWS, block=short.block)
        config = fitted(short, tile_bound(tokens, TILE_ROWS) * spec.heads)
        return short_attention(operands, plan, spec=spec, scale=scale, config=config)
    long = long or tuned("mosaic packed, long", spec, target, long_config(spec, sms))
    plan = packed_plan(query_starts, tokens, spec, rows=long.rows, block=long.block, parts=long.warpgroups)
    return long_attention(operands, plan, spec=spec, scale=scale, config=long)
