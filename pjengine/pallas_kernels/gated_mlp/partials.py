"""Partial sums of a tile that pass between SMs: accumulators in global memory, as the threads hold them."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from pjengine.pallas_kernels.registers import Int32, far_pointer, int32, pointer, this_thread

THREADS = 128
LOAD_BYTES = 16  # of a thread: two registers of a tile


def leave_partial(ref: Any, slot: jax.Array, acc: jax.Array) -> None:
    """Writes a float32 tile in the wgmma accumulator layout to ref[slot]; ref: [slots, tile's elements] in GMEM."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WGMMA))
    def store(ctx: Any, ref: Any, slot: Any, acc: Any) -> None:
        registers = list(acc.registers.flat)
        for i, (low, high) in enumerate(zip(registers[::2], registers[1::2], strict=True)):
            both = vector.shuffle(low, high, [0, 1, 2, 3])
            llvm.store(both, _place(ref, slot, i, len(registers)))

    store(ref, slot, acc)


def add_partial(ref: Any, slot: jax.Array, acc: jax.Array) -> jax.Array:
    """acc plus the tile in ref[slot]."""
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, layout), return_type=result)
    def add(ctx: Any, ref: Any, slot: Any, acc: Any) -> Any:
        registers = np.empty_like(acc.registers)
        places = list(np.ndindex(*acc.registers.shape))
        four = ir.VectorType.get((4,), ir.F32Type.get())
        for i in range(len(places) // 2):
            loaded = llvm.load(four, _place(ref, slot, i, len(places)))
            for half in range(2):
                place = places[2 * i + half]
                part = vector.shuffle(loaded, loaded, [2 * half, 2 * half + 1])
                registers[place] = arith.addf(acc.registers[place], part)
        return mgpu.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=None)

    return add(ref, slot, acc)


def _place(ref: Any, slot: Any, i: int, registers: int) -> Any:
    item_bytes = registers * 8 * THREADS
    return far_pointer(ref, Int32(slot.registers.item()), item_bytes, this_thread().index * LOAD_BYTES + i * LOAD_BYTES * THREADS)


def fence_registers() -> None:
    """Accumulators may be touched by wgmma from here on. The assembler would put a fence of its own into the loop."""

    @plgpu.inline_mgpu()
    def fence(ctx: Any) -> None:
        nvvm.wgmma_fence_aligned()

    fence()


def announce(flags: Any, index: jax.Array) -> None:
    """Makes flags[index] 1; who sees it also sees what this warpgroup wrote to global memory before."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def release(ctx: Any, flags: Any, index: Any) -> None:
        # A barrier and one thread's release order what all threads wrote: causality is transitive in PTX's memory model.
        mgpu_utils.warpgroup_barrier()
        with mgpu_utils.when(this_thread().index.below(1)):
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [_address(flags, index), int32(1).value],
                "st.release.gpu.global.b32 [$0], $1;",
                "l,r,~{memory}",
                has_side_effects=True,
            )

    release(flags, index)


def await_partial(flags: Any, index: jax.Array) -> None:
    """Waits until flags[index] is 1 and makes it 0, so that between launches all are 0."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def acquire(ctx: Any, flags: Any, index: Any) -> None:
        with mgpu_utils.when(this_thread().index.below(1)):
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [_address(flags, index), int32(0).value],
                "{ .reg .pred absent; .reg .b32 seen; again: ld.acquire.gpu.global.b32 seen, [$0]; "
                "setp.eq.b32 absent, seen, 0; @absent bra again; st.relaxed.gpu.global.b32 [$0], $1; }",
                "l,r,~{memory}",
                has_side_effects=True,
            )
        mgpu_utils.warpgroup_barrier()

    acquire(flags, index)


def _address(flags: Any, index: Any) -> Any:
    place = pointer(flags, Int32(index.registers.item()) * 4)
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), place)


