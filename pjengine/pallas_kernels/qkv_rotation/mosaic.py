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
    heads_per_thread: int = 1,
) -> jax.Array:
    """See `pjengine.pallas_kernels.rope_qkv`."""
    norms = () if q_norm is None or k_norm is None else (q_norm, k_norm)
    return _rotate(qkv, cos, sin, norms, spec=spec, heads_per_thread=heads_per_thread)


@functools.partial(jax.jit, static_argnames=("spec", "heads_per_thread"))
def _rotate(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    norms: tuple[jax.Array, ...],
    *,
    spec: RotationSpec,
    heads_per_thread: int,
) -> jax.Array:
    units = qkv.shape[0] * ((spec.heads + spec.kv_heads) // heads_per_thread) * (spec.head_dim // PIECE)
    qkv_ref = jax.new_ref(qkv, memory_space=plgpu.GMEM)
    launch(
        functools.partial(_kernel, spec=spec, units=units, heads_per_thread=heads_per_thread),
        (cos, sin, *norms, qkv_ref),
        scratch={},
        grid={"block": pl.cdiv(units, THREADS)},
        name="rope_qkv",
    )
    return jax.freeze(qkv_ref)


def _kernel(*refs: Any, spec: RotationSpec, units: int, heads_per_thread: int) -> None:
    head_dim, per_head = spec.head_dim, spec.head_dim // PIECE
    stride = (spec.heads + spec.kv_heads) // heads_per_thread

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(refs), plgpu.Layout.WG_SPLAT))
    def turn(ctx: Any, cos: Any, sin: Any, *others: Any) -> None:
        *norms, qkv, block = others
        unit = Int32(block.registers.item()) * THREADS + this_thread().index
        inside = unit.below(units)
        unit = unit.minimum(units - 1)  # the threads of a warp add squares together, all or none
        column, group = unit % per_head, unit // per_head
        token, first = group // stride, group % stride
        heads = [first + i * stride for i in range(heads_per_thread)]
        places = [token * (spec.heads + 2 * spec.kv_heads) + head for head in heads]
        pieces = [load_piece(qkv, place, column, head_dim) for place in places]
        angles = load_angles(cos, sin, token, column, head_dim)
        if spec.norm_eps is not None:
            weights = [load_weights(head.below(spec.heads), *norms, column, head_dim) for head in heads]
            pieces = [normalised(*both, head_dim, spec.norm_eps) for both in zip(pieces, weights, strict=True)]
        with mgpu_utils.when(inside):
            for piece, place in zip(pieces, places, strict=True):
                store_piece(rotated(piece, angles), qkv, place, column, head_dim)

    turn(*refs, lax.axis_index("block"))
