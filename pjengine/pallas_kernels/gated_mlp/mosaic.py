"""Gate and up projections with SwiGLU on Hopper, in Pallas Mosaic GPU: the activation happens in registers.

A persistent product (persistent_product/) whose tiles have the same 128 columns of gate and up. So a thread holds gate
and up of one place, and what leaves is the activation, half the columns, copied out behind the next tile's products.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pjengine.pallas_kernels.backends import TILE_ROWS
from pjengine.pallas_kernels.gated_mlp.swiglu import swiglu_halves
from pjengine.pallas_kernels.persistent_product.mosaic import Columns, Place, launch_product, multiply_tiles
from pjengine.pallas_kernels.persistent_product.tiles import COLUMNS, ProductConfig


@functools.partial(jax.jit, static_argnames="config")
def gated_product(x: jax.Array, weight: jax.Array, *, config: ProductConfig) -> jax.Array:
    """silu(x @ gate) * (x @ up); sums and activation are float32.

    Args:
      x: [T, hidden], bfloat16 or float16, T a multiple of 8, hidden of 64.
      weight: [hidden, 2 * mlp] in x's dtype, gate and up side by side, mlp a multiple of COLUMNS.
    Returns: [T, mlp] in x's dtype.
    """
    (out,) = launch_product(
        functools.partial(_kernel, config=config),
        x,
        weight,
        (),
        config=config,
        out_type=(jax.ShapeDtypeStruct((x.shape[0], weight.shape[1] // 2), x.dtype),),
        name="gated_product",
    )
    return out


def _kernel(x_ref: Any, weight_ref: Any, out_ref: Any, *, out_smem: Any, config: ProductConfig, **scratch: Any) -> None:
    mlp = out_ref.shape[1]

    def columns(block: jax.Array) -> Columns:
        return block * COLUMNS, mlp + block * COLUMNS

    def epilogue(sums: jax.Array, loaded: None, place: Place) -> None:
        result = swiglu_halves(sums).astype(out_ref.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left
        out_smem[place.wg] = result
        plgpu.commit_smem()
        target = out_ref.at[pl.ds(place.own_row, TILE_ROWS), pl.ds(place.columns[0], COLUMNS)]
        plgpu.copy_smem_to_gmem(out_smem.at[place.wg], target)

    multiply_tiles(
        x_ref, weight_ref, blocks=mlp // COLUMNS, columns=columns, epilogue=epilogue, config=config, **scratch
    )
