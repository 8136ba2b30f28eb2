"""In-place KV write on Hopper: TMA moves each token's heads from the packed rows to their places in the pages.

The rotation stays in plain JAX: XLA fuses it with whatever makes q and k. The kernel itself only moves bytes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.backends import HOPPER_SMS
from pjengine.pallas_kernels.kv_write.reference import quantised
from pjengine.pallas_kernels.mosaic_common import launch
from pjengine.pallas_kernels.rope import apply_rope
from pjengine.pallas_kernels.specs import KVWriteSpec

MAX_TOKENS_PER_BLOCK = 8


def rope_write_kv(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
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
    """See `pjengine.pallas_kernels.rope_write_kv`."""
    if cos is not None and sin is not None:
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    k_pages, v_pages = _write(
        quantised(k, k_pages.dtype, k_scale), quantised(v, v_pages.dtype, v_scale), k_pages, v_pages, write_slots
    )
    return q, k_pages, v_pages


@jax.jit
def _write(
    k: jax.Array, v: jax.Array, k_pages: jax.Array, v_pages: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    tokens, kv_heads, head_dim = k.shape
    count = max(1, min(MAX_TOKENS_PER_BLOCK, tokens // (2 * HOPPER_SMS)))
    k_ref, v_ref = (jax.new_ref(x, memory_space=plgpu.GMEM) for x in (k_pages, v_pages))
    launch(
        functools.partial(_write_kernel, count=count, tokens=tokens),
        (k, v, slots, k_ref, v_ref),
        scratch=dict(
            k_smem=plgpu.SMEM((count, kv_heads, head_dim), k_pages.dtype),
            v_smem=plgpu.SMEM((count, kv_heads, head_dim), v_pages.dtype),
            full=plgpu.Barrier(num_arrivals=2),
        ),
        grid={"block": pl.cdiv(tokens, count)},
        name="write_kv",
    )
    return jax.freeze(k_ref), jax.freeze(v_ref)


def _write_kernel(
    k_ref: Any,
    v_ref: Any,
    slots_ref: Any,
    k_pages_ref: Any,
    v_pages_ref: Any,
    *,
    k_smem: Any,
    v_smem: Any,
    full: Any,
    count: int,
    tokens: int,
) -> None:
    base = lax.axis_index("block") * count
    page_size = k_pages_ref.shape[2]
    plgpu.copy_gmem_to_smem(k_ref.at[pl.ds(base, count)], k_smem, full)
    plgpu.copy_gmem_to_smem(v_ref.at[pl.ds(base, count)], v_smem, full)
    slots = [slots_ref[jnp.minimum(base + i, tokens - 1)] for i in range(count)]
    plgpu.barrier_wait(full)
    for i, slot in enumerate(slots):

        @pl.when((slot >= 0) & (base + i < tokens))
        def _(i: int = i, slot: jax.Array = slot) -> None:
            page, offset = lax.div(slot, jnp.int32(page_size)), lax.rem(slot, jnp.int32(page_size))
            plgpu.copy_smem_to_gmem(k_smem.at[i], k_pages_ref.at[page, :, offset])
            plgpu.copy_smem_to_gmem(v_smem.at[i], v_pages_ref.at[page, :, offset])

    plgpu.wait_smem_to_gmem(0)
