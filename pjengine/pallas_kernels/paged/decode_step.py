"""One step of the decode kernel's online softmax, over a block of keys; scores transposed, [tokens, columns]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels.masking import cap_scores
from pjengine.pallas_kernels.mosaic_common import LOG2E, scaled_exp2, tile_iota
from pjengine.pallas_kernels.paged import decode_tiles as tiles
from pjengine.pallas_kernels.paged.decode_new_token import put_token

# Results [head_dim, columns], maxima [columns], weights [block, columns].
State = tuple[jax.Array, jax.Array, jax.Array]


def attend_block(
    q_smem: Any,
    k_smem: Any,
    v_smem: Any,
    weights_smem: Any,
    scratch: Any,
    barriers: tuple[Any, Any, Any],
    visible: tuple[jax.Array, jax.Array] | None,
    state: State,
    *,
    scale: jax.Array,
    soft_cap: float | None,
    newest: tuple[Any, jax.Array] | None = None,
) -> State:
    """One step of the online softmax over all of a block, or over its tokens [visible[0], visible[1]).

    The third part of the state is the sum of weights, still apart by token modulo the block.

    Args:
      newest: key and value [2, head_dim] of a token that the pages did not hold yet, in shared memory, and its place in
        the block, or one past it where it is in another block. Only for K of 16 bits, and with `visible`.
    """
    k_full, v_full, free = barriers
    acc, top, total = state
    k_shared = tiles.keys_from_shared(k_smem.dtype)
    v_shared = tiles.values_from_shared(v_smem.dtype, v_smem.shape[1])

    def put(part: int, smem: Any, finish: Callable[[], None] = lambda: None) -> None:
        if newest is None:
            return
        values, place = newest

        @pl.when(place < smem.shape[0])
        def _() -> None:
            put_token(values.at[part], smem, place)
            finish()

    plgpu.barrier_wait(k_full)
    put(0, k_smem, plgpu.commit_smem)
    keys = k_smem if k_shared else tiles.key_fragments(k_smem)

    def finish_values() -> None:
        plgpu.barrier_wait(v_full)
        if visible is not None:
            put(1, v_smem)  # committed with the cleared ones
            tiles.clear_tokens_outside(v_smem, *visible)

    def load_values() -> jax.Array:
        finish_values()
        values = tiles.value_fragments(v_smem)
        if not k_shared:
            plgpu.barrier_arrive(free)
        return values

    def scores(acc_ref: Any) -> Any:
        plgpu.wgmma(acc_ref, keys, q_smem.transpose((1, 0)))
        values = None if v_shared else load_values()  # while the product runs
        return acc_ref[...], values

    qk, values = pl.run_scoped(scores, plgpu.ACC((total.shape[0], total.shape[1]), jnp.float32))
    if k_shared and not v_shared:
        plgpu.barrier_arrive(free)
    factor = scale * LOG2E
    if soft_cap is not None:
        qk, factor = cap_scores(qk * scale, soft_cap), jnp.float32(LOG2E)
    if visible is not None:
        token = tile_iota((qk.shape[0], qk.shape[1]), 0)
        qk = jnp.where((token < visible[1]) & (token >= visible[0]), qk, -jnp.inf)
    new_top = jnp.maximum(top, tiles.reduce_tokens(qk, scratch, largest=True) * factor)
    rescale = jnp.exp2(top - new_top)
    weights = scaled_exp2(qk, factor, new_top, 1)
    total = total * lax.broadcast_in_dim(rescale, total.shape, [1]) + weights
    acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [1])
    tiles.store_weights(weights_smem, weights.astype(weights_smem.dtype))
    if v_shared:
        finish_values()
        values = v_smem.transpose((1, 0))
    plgpu.commit_smem()
    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, values, weights_smem.transpose((1, 0))))(plgpu.ACC.init(acc))
    if v_shared:
        plgpu.barrier_arrive(free)
    return acc, new_top, total
