"""Norms, rotation and in-place KV write of a fused projection on Hopper: one launch that reads it where it lies.

It is all loads and stores, 16 bytes each, so what counts is that there is one launch, where rotations of q and k, a
copy of v and a write would be four.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir.dialects import arith

from pjengine.pallas_kernels import head_sizes
from pjengine.pallas_kernels.head_norms import norm_heads
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
from pjengine.pallas_kernels.kv_write import mosaic
from pjengine.pallas_kernels.mosaic_common import launch
from pjengine.pallas_kernels.registers import Int32, int32, load_words, page_item, this_thread
from pjengine.pallas_kernels.specs import KVWriteSpec

THREADS = 128


def rope_write_kv_qkv(
    qkv: jax.Array,
    cos: jax.Array | None,
    sin: jax.Array | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    write_slots: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    q_norm: jax.Array | None,
    k_norm: jax.Array | None,
    *,
    spec: KVWriteSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pjengine.pallas_kernels.rope_write_kv_qkv`. What the kernel does not serve, XLA rotates and narrows."""
    if cos is not None and sin is not None and _serves(spec):
        norms = () if q_norm is None or k_norm is None else (q_norm, k_norm)
        return _rotate_and_write(qkv, cos, sin, norms, k_pages, v_pages, write_slots, spec=spec)
    q, k, v = jnp.split(qkv, (spec.heads, spec.heads + spec.kv_heads), axis=1)
    q, k = norm_heads(q, k, q_norm, k_norm, spec.norm_eps)
    return mosaic.rope_write_kv(q, k, v, cos, sin, k_pages, v_pages, write_slots, k_scale, v_scale, spec=spec)


def _serves(spec: KVWriteSpec) -> bool:
    """Whether elements are stored as they are, and heads can be held in pieces."""
    plain = spec.kv_dtype == spec.dtype and not spec.kv_scales
    return plain and head_sizes.refusal(spec.head_dim, spec.dtype, norm=spec.norm_eps is not None) is None


@functools.partial(jax.jit, static_argnames="spec")
def _rotate_and_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    norms: tuple[jax.Array, ...],
    k_pages: jax.Array,
    v_pages: jax.Array,
    slots: jax.Array,
    *,
    spec: KVWriteSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens = qkv.shape[0]
    k_ref, v_ref = (jax.new_ref(x, memory_space=plgpu.GMEM) for x in (k_pages, v_pages))
    units = tokens * (spec.heads + 2 * spec.kv_heads) * (spec.head_dim // PIECE)
    (q,) = launch(
        functools.partial(_kernel, spec=spec, units=units),
        (qkv, cos, sin, slots, *norms, k_ref, v_ref),
        out_type=(jax.ShapeDtypeStruct((tokens, spec.heads, spec.head_dim), qkv.dtype),),
        scratch={},
        grid={"block": pl.cdiv(units, THREADS)},
        name="rope_write_kv",
    )
    return q, jax.freeze(k_ref), jax.freeze(v_ref)


def _kernel(*refs: Any, spec: KVWriteSpec, units: int) -> None:
    heads, kv_heads, head_dim, page_size = spec.heads, spec.kv_heads, spec.head_dim, spec.page_size
    per_head, per_token = head_dim // PIECE, heads + 2 * kv_heads

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(refs), plgpu.Layout.WG_SPLAT))
    def move(ctx: Any, qkv: Any, cos: Any, sin: Any, slots: Any, *others: Any) -> None:
        *norms, k_pages, v_pages, q, block = others
        unit = Int32(block.registers.item()) * THREADS + this_thread().index
        real = unit.below(units)
        unit = unit.minimum(units - 1)  # all threads of a warp add squares together
        column, row = unit % per_head, unit // per_head
        token, head = row // per_token, row % per_token
        as_is = load_piece(qkv, row, column, head_dim)
        slot = Int32(*load_words(slots, token * 4, 4))
        angles = load_angles(cos, sin, token, column, head_dim)
        piece = widened(as_is)
        if spec.norm_eps is not None:
            weights = load_weights(norms, head.below(heads), column, head_dim)
            piece = normalised(piece, weights, head_dim, spec.norm_eps)
        turns = head.below(heads + kv_heads)
        turned = rotated(piece, angles, as_is[0].type)
        moved = [arith.select(turns, *halves) for halves in zip(turned, as_is, strict=True)]
        with mgpu_utils.when(arith.andi(real, head.below(heads))):
            store_piece(moved, q, token * heads + head, column, head_dim)
        written = arith.andi(real, arith.cmpi(arith.CmpIPredicate.sge, slot.value, int32(0).value))
        for ref, begin in ((k_pages, heads), (v_pages, heads + kv_heads)):
            own = Int32(arith.subi(head.value, int32(begin).value))
            inside = arith.cmpi(arith.CmpIPredicate.ult, own.value, int32(kv_heads).value)
            with mgpu_utils.when(arith.andi(inside, written)):
                store_piece(moved, ref, page_item(slot, own, kv_heads, page_size), column, head_dim)

    move(*refs, lax.axis_index("block"))
