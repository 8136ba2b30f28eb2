"""Rotation of a fused projection on Hopper, where it lies: one launch that leaves v alone.

It is all loads and stores, as the KV write is (kv_write/mosaic_qkv.py).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu_utils

from pjengine.pallas_kernels.head_pieces import (
    load_angles,
    load_piece,
    load_weights,
    normalised,
    rotated,
    store_piece,
    widened,
)
from pjengine.pallas_kernels.head_sizes import PIECE
from pjengine.pallas_kernels.mosaic_common import launch
from pjengine.pallas_kernels.registers import Int32, this_thread
from pjengine.pallas_kernels.specs import RotationSpec

THREADS = 128


def rope_qkv(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    q_norm: jax.Array | None,
    k_norm: jax.Array | None,
    *,
    spec: RotationSpec,
) -> jax.Array:
    """See `pjengine.pallas_kernels.rope_qkv`."""
    norms = () if q_norm is None or k_norm is None else (q_norm, k_norm)
    return _rotate(qkv, cos, sin, norms, spec=spec)


@functools.partial(jax.jit, static_argnames="spec")
def _rotate(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, norms: tuple[jax.Array, ...], *, spec: RotationSpec
) -> jax.Array:
    units = qkv.shape[0] * (spec.heads + spec.kv_heads) * (spec.head_dim // PIECE)
    qkv_ref = jax.new_ref(qkv, memory_space=plgpu.GMEM)
    launch(
        functools.partial(_kernel, spec=spec, units=units),
        (cos, sin, *norms, qkv_ref),
        scratch={},
        grid={"block": pl.cdiv(units, THREADS)},
        name="rope_qkv",
    )
    return jax.freeze(qkv_ref)


def _kernel(*refs: Any, spec: RotationSpec, units: int) -> None:
    head_dim, per_head, turning = spec.head_dim, spec.head_dim // PIECE, spec.heads + spec.kv_heads

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(refs), plgpu.Layout.WG_SPLAT))
    def turn(ctx: Any, cos: Any, sin: Any, *others: Any) -> None:
        *norms, qkv, block = others
        unit = Int32(block.registers.item()) * THREADS + this_thread().index
        real = unit.below(units)
        unit = unit.minimum(units - 1)  # all threads of a warp add squares together
        column, row = unit % per_head, unit // per_head
        token, head = row // turning, row % turning
        place = token * (turning + spec.kv_heads) + head
        as_is = load_piece(qkv, place, column, head_dim)
        angles = load_angles(cos, sin, token, column, head_dim)
        piece = widened(as_is)
        if spec.norm_eps is not None:
            weights = load_weights(norms, head.below(spec.heads), column, head_dim)
            piece = normalised(piece, weights, head_dim, spec.norm_eps)
        with mgpu_utils.when(real):
            store_piece(rotated(piece, angles, as_is[0].type), qkv, place, column, head_dim)

    turn(*refs, lax.axis_index("block"))
