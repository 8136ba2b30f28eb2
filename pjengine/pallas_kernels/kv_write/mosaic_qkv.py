"""Rotation and in-place KV write of a fused projection on Hopper: one launch that reads the projection where it lies.

A thread takes 8 elements of a head's first half and the 8 that they turn with: two loads of 16 bytes, two stores. It is
all loads and stores, so what counts is that there is one launch, where rotations of q and k, a copy of v and a write
would be four.
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
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxlib.mlir.dialects import math as mlir_math

from pjengine.pallas_kernels.kv_write import mosaic
from pjengine.pallas_kernels.mosaic_common import launch
from pjengine.pallas_kernels.registers import Int32, far_pointer, int32, load_words, pointer, this_thread
from pjengine.pallas_kernels.specs import KVWriteSpec

VECTOR = 8  # elements of a load: 16 bytes
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
    *,
    spec: KVWriteSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pjengine.pallas_kernels.rope_write_kv_qkv`. What the kernel does not serve, XLA rotates and narrows."""
    if cos is not None and sin is not None and _serves(spec):
        return _rotate_and_write(qkv, cos, sin, k_pages, v_pages, write_slots, spec=spec)
    q, k, v = jnp.split(qkv, (spec.heads, spec.heads + spec.kv_heads), axis=1)
    return mosaic.rope_write_kv(q, k, v, cos, sin, k_pages, v_pages, write_slots, k_scale, v_scale, spec=spec)


def _serves(spec: KVWriteSpec) -> bool:
    """Whether elements are of 16 bits and stored as they are, and a thread's loads divide half a head."""
    plain = spec.kv_dtype == spec.dtype and not spec.kv_scales
    return plain and jnp.dtype(spec.dtype).itemsize == 2 and spec.head_dim % (2 * VECTOR) == 0


@functools.partial(jax.jit, static_argnames="spec")
def _rotate_and_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    slots: jax.Array,
    *,
    spec: KVWriteSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens = qkv.shape[0]
    k_ref, v_ref = (jax.new_ref(x, memory_space=plgpu.GMEM) for x in (k_pages, v_pages))
    units = tokens * (spec.heads + 2 * spec.kv_heads) * (spec.head_dim // (2 * VECTOR))
    (q,) = launch(
        functools.partial(_kernel, spec=spec, units=units),
        (qkv, cos, sin, slots, k_ref, v_ref),
        out_type=(jax.ShapeDtypeStruct((tokens, spec.heads, spec.head_dim), qkv.dtype),),
        scratch={},
        grid={"block": pl.cdiv(units, THREADS)},
        name="rope_write_kv",
    )
    return q, jax.freeze(k_ref), jax.freeze(v_ref)


def _kernel(
    qkv_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    slots_ref: Any,
    k_pages_ref: Any,
    v_pages_ref: Any,
    q_ref: Any,
    *,
    spec: KVWriteSpec,
    units: int,
) -> None:
    heads, kv_heads, head_dim, page_size = spec.heads, spec.kv_heads, spec.head_dim, spec.page_size
    per_head, per_token = head_dim // (2 * VECTOR), heads + 2 * kv_heads
    half_bytes = head_dim  # of 16-bit elements

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 7, plgpu.Layout.WG_SPLAT))
    def move(
        ctx: Any, qkv: Any, cos: Any, sin: Any, slots: Any, k_pages: Any, v_pages: Any, q: Any, block: Any
    ) -> None:
        element = ir.MemRefType(qkv.type).element_type
        narrow, wide = ir.VectorType.get((VECTOR,), element), ir.VectorType.get((VECTOR,), ir.F32Type.get())
        unit = Int32(block.registers.item()) * THREADS + this_thread().index
        with mgpu_utils.when(unit.below(units)):
            column, row = unit % per_head, unit // per_head
            token, head = row // per_token, row % per_token
            offset = column * (2 * VECTOR)  # bytes into a half
            first, second = (
                llvm.load(narrow, far_pointer(qkv, row, 2 * half_bytes, offset + half * half_bytes)) for half in (0, 1)
            )
            slot = Int32(*load_words(slots, token * 4, 4))
            turns = head.below(heads + kv_heads)
            angles = (token * (head_dim // 2) + column * VECTOR) * 4
            c, s = (llvm.load(wide, pointer(ref, angles)) for ref in (cos, sin))
            a, b = arith.extf(wide, first), arith.extf(wide, second)
            left = mlir_math.fma(a, c, arith.negf(arith.mulf(b, s)))
            right = mlir_math.fma(b, c, arith.mulf(a, s))
            halves = [
                arith.select(turns, arith.truncf(narrow, turned), as_is)
                for turned, as_is in ((left, first), (right, second))
            ]

            def store(ref: Any, place: Int32) -> None:
                for half, values in enumerate(halves):
                    llvm.store(values, far_pointer(ref, place, 2 * half_bytes, offset + half * half_bytes))

            with mgpu_utils.when(head.below(heads)):
                store(q, token * heads + head)
            written = arith.cmpi(arith.CmpIPredicate.sge, slot.value, int32(0).value)
            for ref, begin in ((k_pages, heads), (v_pages, heads + kv_heads)):
                own = Int32(arith.subi(head.value, int32(begin).value))
                inside = arith.cmpi(arith.CmpIPredicate.ult, own.value, int32(kv_heads).value)
                with mgpu_utils.when(arith.andi(inside, written)):
                    store(ref, (slot // page_size * kv_heads + own) * page_size + slot % page_size)

    move(qkv_ref, cos_ref, sin_ref, slots_ref, k_pages_ref, v_pages_ref, q_ref, lax.axis_index("block"))
