"""The fused projection of q, k and v on Hopper, in Pallas Mosaic GPU: norms and rotation happen in registers.

A persistent product (persistent_product/) whose tiles are 256 columns beside each other, 2 heads of 128 or 4 of 64.
The float32 sums are normalised and rotated, then rounded once, and leave by way of shared memory, 128 columns after the
other: as the projection's array, or q as one and k and v to their tokens' slots in the pages.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.backends import TILE_ROWS
from pjengine.pallas_kernels.persistent_product.mosaic import Columns, Place, launch_product, multiply_tiles
from pjengine.pallas_kernels.persistent_product.tiles import COLUMNS, ProductConfig
from pjengine.pallas_kernels.qkv_projection.heads import load_angles, store_in_pages, turn_heads
from pjengine.pallas_kernels.specs import QKVSpec

Arrays = tuple[jax.Array, ...]


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def qkv_product(
    x: jax.Array,
    weight: jax.Array,
    angles: Arrays,
    norms: Arrays,
    bias: Arrays,
    *,
    spec: QKVSpec,
    config: ProductConfig,
) -> jax.Array:
    """x @ weight + bias, its heads of q and k normalised and rotated: [T, heads + 2 * kv_heads, head_dim].

    Args:
      angles: cos and sin; norms: weights of q's and of k's, or none; bias: one or none.
      The others: as in `pjengine.pallas_kernels.qkv_projection`.
    """
    (out,) = launch_product(
        functools.partial(_kernel, spec=spec, config=config),
        x,
        weight,
        (*angles, *norms, *bias),
        config=config,
        out_type=(jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), x.dtype),),
        name="qkv_product",
    )
    return out.reshape(x.shape[0], -1, spec.head_dim)


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def qkv_product_paged(
    x: jax.Array,
    weight: jax.Array,
    angles: Arrays,
    norms: Arrays,
    bias: Arrays,
    k_pages: jax.Array,
    v_pages: jax.Array,
    slots: jax.Array,
    *,
    spec: QKVSpec,
    config: ProductConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `qkv_product`, k and v written to the pages. Returns: q [T, heads, head_dim], k_pages, v_pages."""
    k_ref, v_ref = (jax.new_ref(pages, memory_space=plgpu.GMEM) for pages in (k_pages, v_pages))
    (q,) = launch_product(
        functools.partial(_kernel, spec=spec, config=config),
        x,
        weight,
        (*angles, *norms, *bias, slots, k_ref, v_ref),
        config=config,
        out_type=(jax.ShapeDtypeStruct((x.shape[0], spec.heads * spec.head_dim), x.dtype),),
        name="qkv_product_paged",
    )
    return q.reshape(x.shape[0], spec.heads, spec.head_dim), jax.freeze(k_ref), jax.freeze(v_ref)


def _kernel(
    x_ref: Any, weight_ref: Any, *refs: Any, out_smem: Any, spec: QKVSpec, config: ProductConfig, **scratch: Any
) -> None:
    cos_ref, sin_ref, *others, out_ref = refs
    norms = [] if spec.norm_eps is None else [others.pop(0) for _ in range(2)]
    bias_ref = others.pop(0) if spec.bias else None
    slots_ref, k_pages, v_pages = others or (None, None, None)
    width, q_width = weight_ref.shape[1], out_ref.shape[1]

    def load(place: Place) -> jax.Array:
        return load_angles(cos_ref, sin_ref, place.own_row)

    def epilogue(sums: jax.Array, angles: jax.Array, place: Place) -> None:
        staged = out_smem.at[place.wg]

        def send(column: jax.Array) -> None:
            target = out_ref.at[pl.ds(place.own_row, TILE_ROWS), pl.ds(column, COLUMNS)]
            plgpu.copy_smem_to_gmem(staged, target)

        def leave(block: int, column: jax.Array) -> None:
            values = turn_heads(sums, angles, bias_ref, norms, column, block=block, spec=spec)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the block before has left
            out_smem[place.wg] = values
            plgpu.commit_smem()
            if slots_ref is None:
                send(column)
                return
            pl.when(column < q_width)(lambda: send(column))

            @pl.when(column >= q_width)
            def _() -> None:
                head = lax.div(column - q_width, jnp.int32(spec.head_dim))
                store_in_pages(staged, k_pages, v_pages, slots_ref, place.own_row, head, spec=spec)

        for block, column in enumerate(place.columns):
            if width % (2 * COLUMNS) or config.beside:  # some columns may lie beyond the last
                pl.when(column < width)(functools.partial(leave, block, column))
            else:
                leave(block, column)

    def columns(block: jax.Array) -> Columns:
        return block * (2 * COLUMNS), block * (2 * COLUMNS) + COLUMNS

    multiply_tiles(
        x_ref,
        weight_ref,
        blocks=pl.cdiv(width, 2 * COLUMNS),
        columns=columns,
        epilogue=epilogue,
        load=load,
        config=config,
        **scratch,
    )
