"""What the decode kernel does where it also rotates and writes the step's tokens: a row's queries, its new key and its
new value, from the fused projection to shared memory and to their place in the pages.

The new token's block is copied from pages that do not hold it yet; `put_token` writes it over what was copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir.dialects import arith, llvm

from pjengine.pallas_kernels.head_pieces import (
    both_halves,
    load_angles,
    load_piece,
    load_weights,
    normalised,
    rotated,
    widened,
)
from pjengine.pallas_kernels.head_sizes import LANES, VECTOR
from pjengine.pallas_kernels.mosaic_common import tile_swizzle, tile_transforms
from pjengine.pallas_kernels.registers import (
    Int32,
    far_pointer,
    int32,
    load_words,
    page_item,
    pointer,
    this_thread,
    tile_offset,
    unhoisted,
    words,
)
from pjengine.pallas_kernels.specs import AttentionSpec

THREADS = 128  # of a warpgroup


class NewTokens(NamedTuple):
    """What the kernel needs to make a fused projection's heads queries, keys and values; arrays, or references to them.

    Attributes:
      cos, sin: float32 [T, head_dim // 2]; slots: int32 [T]: page * page_size + offset, negative: not written.
      norms: [head_dim] each, the weights of q's and of k's norms, or nothing.
    """

    cos: Any
    sin: Any
    slots: Any
    norms: tuple[Any, ...]


def stage_projection(
    qkv: Any,
    new: NewTokens,
    pages: tuple[Any, Any],
    row: jax.Array,
    head: jax.Array,
    closes: jax.Array,
    smem: Any,
    token_smem: Any,
    *,
    spec: AttentionSpec,
    norm_eps: float | None,
) -> None:
    """Rotates the queries of one row and KV head into shared memory, as wgmma's right operand; where `closes`, its key
    and value too, to token_smem and to the pages. The caller commits the writes.

    Args:
      qkv: GMEM reference [T, heads + 2 * kv_heads, head_dim], 16-bit; pages: those of K and of V.
      row: whose token is the row'th.
      closes: the warpgroup's run of blocks ends with the token's own: one run of a pair does.
      smem: tiled [columns, head_dim]; columns past the group keep what they held: no other column depends on them.
      token_smem: [2, head_dim], key and value, in qkv's dtype.
    """
    head_dim, page_size, group = spec.head_dim, pages[0].shape[2], spec.group
    # Pieces of 8 and 8 elements strain the copying warpgroup's registers, but loads of a second turn would wait for the
    # first one's. Norms add in the same order.
    width = VECTOR // 2 if (group + 2) * head_dim // VECTOR <= THREADS else VECTOR
    per_head, per_token = head_dim // (2 * width), spec.heads + 2 * spec.kv_heads
    units = (group + 2) * per_head
    busy = -(-units // LANES) * LANES  # whole warps: their threads add squares together
    splat = plgpu.Layout.WG_SPLAT
    operands = (qkv, new.cos, new.sin, new.slots, *pages, token_smem, *new.norms)
    arg_types = (plgpu.RefType(tile_transforms(head_dim, smem.dtype)), *[splat] * 3, *[plgpu.RefType()] * len(operands))

    @plgpu.inline_mgpu(arg_types=arg_types)
    def stage(ctx: Any, target: Any, row: Any, head: Any, closes: Any, *refs: Any) -> None:
        qkv, cos, sin, slots, k_pages, v_pages, kept, *norms = refs
        token, kv_head = (Int32(x.registers.item()) for x in (row, head))
        closing = arith.cmpi(arith.CmpIPredicate.ne, closes.registers.item(), int32(0).value)
        swizzle = tile_swizzle(head_dim, smem.dtype)

        def one(unit: Int32) -> None:
            real, unit = unit.below(units), unit.minimum(units - 1)
            member, column = unit // per_head, unit % per_head
            is_query = member.below(group)
            own = Int32(arith.subi(member.value, int32(group).value))  # 0: the key, 1: the value
            query = kv_head * group + member
            other = kv_head + own * spec.kv_heads + spec.heads
            source = token * per_token + Int32(arith.select(is_query, query.value, other.value))
            as_is = load_piece(qkv, source, column, head_dim, width)
            slot = Int32(*load_words(slots, token * 4, 4))
            angles = load_angles(cos, sin, token, column, head_dim, width)
            piece = widened(as_is)
            if norm_eps is not None:
                weights = load_weights(norms, is_query, column, head_dim, width)
                piece = normalised(piece, weights, head_dim, norm_eps)
            turned = rotated(piece, angles, as_is[0].type)
            turns = member.below(group + 1)
            moved = [arith.select(turns, *halves) for halves in zip(turned, as_is, strict=True)]
            starts = [column * (2 * width) + i * head_dim for i in (0, 1)]
            with mgpu_utils.when(is_query):
                for half, start in zip(moved, starts, strict=True):
                    place = tile_offset(member // 8, member % 8, start, head_dim * 2, swizzle)
                    llvm.store(half, pointer(target, place))
            is_new = arith.cmpi(arith.CmpIPredicate.sge, own.value, int32(0).value)
            keeps = arith.andi(closing, arith.andi(real, is_new))
            with mgpu_utils.when(keeps):
                for half, start in zip(moved, starts, strict=True):
                    llvm.store(half, pointer(kept, own * (head_dim * 2) + start))
            written = arith.andi(keeps, arith.cmpi(arith.CmpIPredicate.sge, slot.value, int32(0).value))
            with mgpu_utils.when(written):
                item = page_item(slot, kv_head, spec.kv_heads, page_size)
                places = (far_pointer(ref, item, head_dim * 2, column * (2 * width)) for ref in (k_pages, v_pages))
                written_to = both_halves(llvm.select(own.equals(int32(0)), *places), head_dim)
                for half, address in zip(moved, written_to, strict=True):
                    llvm.store(half, address)

        for first in range(0, units, THREADS):
            unit = unhoisted(this_thread().index) + first
            with mgpu_utils.when(unit.below(busy)):
                one(unit)

    stage(smem, row, head, closes, *operands)


def put_token(values: Any, smem: Any, row: jax.Array) -> None:
    """Overwrites row `row` of tiled [tokens, head_dim] shared memory with values [head_dim], of 16 bits and in shared
    memory too. The caller commits the writes."""
    head_dim = smem.shape[1]
    arg_types = (plgpu.RefType(), plgpu.RefType(tile_transforms(head_dim, smem.dtype)), plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=arg_types)
    def put(ctx: Any, source: Any, target: Any, row: Any) -> None:
        chunk, swizzle = this_thread().index, tile_swizzle(head_dim, smem.dtype)
        token = Int32(row.registers.item())
        with mgpu_utils.when(chunk.below(head_dim // 8)):
            place = tile_offset(token // 8, token % 8, chunk * 16, head_dim * 2, swizzle)
            llvm.store(llvm.load(words(4), pointer(source, chunk * 16)), pointer(target, place))

    put(values, smem, row)
