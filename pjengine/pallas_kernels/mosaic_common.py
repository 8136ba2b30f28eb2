"""What the Mosaic GPU kernels share: tiles in shared memory, loads, stores and clearing, constants.

Lane semantics throughout: every layout in the kernels is explicit, none is inferred.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as mlir_math

from pjengine.pallas_kernels.assembler import remember_version
from pjengine.pallas_kernels.backends import TILE_ROWS
from pjengine.pallas_kernels.registers import pointer, this_thread, zero_words

LOG2E = math.log2(math.e)
# Below every real score, yet finite: rescaling by exp2(old - new) must not meet inf - inf.
MASKED = -1e30

remember_version()


def compiler_params(**kwargs: Any) -> plgpu.CompilerParams:
    """approx_math: exp2 and division as the hardware has them (2 ulp); far below bfloat16's rounding."""
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, **kwargs)


def tile_swizzle(columns: int, dtype: Any) -> int:
    """Bytes of a row of the tiles in which wgmma reads rows of `columns` elements: 16 (no swizzle), 32, 64 or 128."""
    return int(plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8))


def tile_transforms(columns: int, dtype: Any) -> tuple[Any, ...]:
    """How [..., rows, columns] lies in shared memory: tiled and swizzled."""
    swizzle = tile_swizzle(columns, dtype)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return (tiling, plgpu.SwizzleTransform(swizzle)) if swizzle > 16 else (tiling,)


def tiled_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory whose last two dimensions wgmma can read: tiled and swizzled."""
    return plgpu.SMEM(shape, dtype, transforms=tile_transforms(shape[-1], dtype))


def column(value: float, rows: int = TILE_ROWS) -> jax.Array:
    """float32 [rows] constant in the layout of a wgmma tile's row reductions."""
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def tile(value: float, columns: int, rows: int = TILE_ROWS) -> jax.Array:
    """float32 [rows, columns] constant in the wgmma accumulator layout."""
    return plgpu.layout_cast(jnp.full((rows, columns), value, jnp.float32), plgpu.Layout.WGMMA)


def tile_iota(shape: tuple[int, int], dimension: int) -> jax.Array:
    """int32 iota in the wgmma accumulator layout."""
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA)


def scaled_exp2(x: jax.Array, scale: jax.Array | float, shift: jax.Array, dimension: int) -> jax.Array:
    """exp2(x * scale - shift) of a float32 tile in the wgmma accumulator layout, one fused multiply-add per element.

    Args:
      scale: scalar; shift: a vector along `dimension` of x, in the layout of a reduction over the other one.
    """
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=plgpu.Layout.WGMMA)
    arg_types = (plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT, plgpu.Layout.WGMMA.reduce(1 - dimension))

    @plgpu.inline_mgpu(arg_types=arg_types, return_type=result)
    def compute(ctx: Any, x: Any, scale: Any, shift: Any) -> Any:
        shift = shift.broadcast_in_dim(x.shape, (dimension,), x.layout)
        registers = np.empty_like(x.registers)
        for place, register in np.ndenumerate(x.registers):
            factor = vector.broadcast(register.type, scale.registers.item())
            registers[place] = mlir_math.fma(register, factor, arith.negf(shift.registers[place]))
        fused = mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)
        return fused.exp2(approx=True)

    return compute(x, jnp.float32(scale), shift)


def load_whole(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """All of a reference, in registers. JAX 0.10 wants an index that later versions warn about."""
    takes_index = inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty
    return plgpu.load(ref, *([()] if takes_index else []), layout=layout, optimized=optimized)


def store_prefix(ref: Any, values: jax.Array, layout: Any, size: int) -> None:
    """Writes the first `size` elements of a vector to global memory.

    Args:
      ref: GMEM reference [size].
      values: [n] in `layout`, n >= size, of ref's dtype.
      layout: a WG_STRIDED layout whose vector size divides `size`.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def store(ctx: Any, ref: Any, values: Any) -> None:
        limit = mgpu.c(size, ir.IndexType.get())
        for index, register in zip(values.layout.linear_thread_idxs(), values.registers.flat, strict=True):
            keep = arith.cmpi(arith.CmpIPredicate.ult, index, limit)
            with mgpu_utils.when(keep):
                vector.store(register, ref, [index])

    store(ref, values)


def clear_memory(ref: Any, nbytes: int) -> None:
    """Zeroes the first nbytes (a multiple of 16) of a contiguous, 16-byte aligned reference in global memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def clear(ctx: Any, ref: Any) -> None:
        for first in range(0, nbytes // 16, 128):
            chunk = this_thread().index + first
            with mgpu_utils.when(chunk.below(nbytes // 16)):
                llvm.store(zero_words(4), pointer(ref, chunk * 16))

    clear(ref)


def clear_rows_from(smem: Any, end: jax.Array) -> None:
    """Zeroes the rows from `end` on of a tiled [rows, columns] buffer: they may hold NaN, and 0 * NaN is NaN.

    Nothing happens where end >= rows. Several warpgroups may clear one buffer at once.
    """
    rows = smem.shape[0]

    @pl.when(end < rows)
    def _() -> None:
        for start in range(0, rows, TILE_ROWS):
            part = smem.at[pl.ds(start, TILE_ROWS)]

            @pl.when(end < start + TILE_ROWS)
            def _(part: Any = part, start: int = start) -> None:
                values = part[...]
                keep = tile_iota(values.shape, 0) < end - start
                part[...] = jnp.where(keep, values, jnp.zeros_like(values))

        plgpu.commit_smem()


def launch(
    body: Any,
    operands: tuple[Any, ...],
    *,
    scratch: dict[str, Any],
    grid: dict[str, int],
    name: str,
    warpgroups: int = 1,
    out_type: tuple[Any, ...] = (),
    cluster: dict[str, int] | None = None,
) -> Any:
    """Runs a Mosaic kernel; unlike `plgpu.kernel` it may also write operands that are `jax.new_ref`s.

    Args:
      body: called with a reference per operand and per output, and the scratch by name. The axis "wg" is the warpgroup.
      grid: size of each named grid axis, in clusters; cluster: of each named axis of a cluster, in thread blocks.
    Returns: the outputs.
    """

    def kernel(*refs: Any) -> None:
        pl.run_scoped(functools.partial(body, *refs), collective_axes="wg", **scratch)

    mesh = plgpu.Mesh(
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=tuple(cluster.values()) if cluster else (),
        cluster_names=tuple(cluster) if cluster else (),
        num_threads=warpgroups,
        thread_name="wg",
        kernel_name=name,
    )
    return pl.kernel(kernel, out_type=out_type, mesh=mesh, compiler_params=compiler_params(), name=name)(*operands)
