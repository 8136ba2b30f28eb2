"""The weights of an encoder's layers in the order in which the kernel for few tokens multiplies by them.

Block b of hidden / 8 has 8 columns (up: 4 x 8) of each product. Of a layer it reads twelve chunks of [hidden, 8], one
after the other: q, k, v, o, four of up, four of down. In a chunk each of `heads` warps has head_dim rows, for which
lane 4 g + c holds eight rows of the column g at a time: what two products m16n8k16 take as their right operand.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

CHUNKS = 12
COLUMNS = 8  # of a chunk


@struct.dataclass
class PackedLayers:
    """Weights of L layers.

    Attributes:
      weights: [L, hidden / 8, 12, 8 * hidden]; biases: [L, 9 * hidden], of q, k, v, o, up and down; norms:
        [L, 4, hidden], weight and bias behind attention, weight and bias behind the MLP.
      counter: int32 [1], 0: how many blocks of a launch have arrived at its barriers.
      heads: attention heads.
    """

    weights: jax.Array
    biases: jax.Array
    norms: jax.Array
    counter: jax.Array
    heads: int = struct.field(pytree_node=False)


def pack_layers(layers: Sequence[dict[str, jax.Array]], heads: int) -> PackedLayers:
    """The layers' weights once more, as `encoder_stack` reads them; all of one dtype, which stays.

    Args:
      layers: of each qkv [hidden, 3 * hidden], o [hidden, hidden], up [hidden, 4 * hidden], down [4 * hidden, hidden];
        qkv_bias, o_bias, up_bias and down_bias of their columns; attn_norm, attn_norm_bias, mlp_norm and mlp_norm_bias
        [hidden].
      heads: attention heads; hidden / heads is a multiple of 32.
    Raises:
      ValueError: the MLP is not four times as wide as hidden, or heads do not fit.
    """
    hidden, mlp = layers[0]["up"].shape
    if mlp != 4 * hidden:
        raise ValueError(f"layers: up: expected [{hidden}, {4 * hidden}], got [{hidden}, {mlp}]")
    if hidden % (32 * heads):
        raise ValueError(f"heads: hidden / heads must be a multiple of 32, got {hidden} / {heads}")
    packed = [_pack_layer(layer, heads) for layer in layers]
    weights, biases, norms = (jnp.stack(arrays) for arrays in zip(*packed, strict=True))
    return PackedLayers(weights, biases, norms, jnp.zeros(1, jnp.int32), heads)


@functools.partial(jax.jit, static_argnums=1)
def _pack_layer(layer: dict[str, jax.Array], heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    hidden = layer["o"].shape[0]
    head_dim = hidden // heads
    plain, attended = plain_rows(hidden, heads), attended_rows(hidden, heads)

    def chunks(weight: jax.Array, rows: np.ndarray, per_block: int) -> jax.Array:
        """[blocks, per_block, 8 * hidden] of [hidden, columns], a block's chunks next to each other in the columns."""
        picked = weight[rows.reshape(-1)].reshape(heads, head_dim // 32, 4, 8, -1, per_block, COLUMNS)
        return picked.transpose(4, 5, 0, 1, 6, 2, 3).reshape(-1, per_block, COLUMNS * hidden)

    # A warp has as many rows of each chunk of down, but 4 * head_dim neighbouring ones in all.
    down = layer["down"].reshape(heads, 4, head_dim, hidden).swapaxes(0, 1).reshape(4, hidden, hidden)
    weights = jnp.concatenate(
        [
            *(chunks(part, plain, 1) for part in jnp.split(layer["qkv"], 3, axis=1)),
            chunks(layer["o"], attended, 1),
            chunks(layer["up"], plain, 4),
            *(chunks(part, plain, 1) for part in down),
        ],
        axis=1,
    )
    biases = jnp.concatenate([layer[f"{name}_bias"] for name in ("qkv", "o", "up", "down")])
    norms = jnp.stack([layer[f"{name}{part}"] for name in ("attn_norm", "mlp_norm") for part in ("", "_bias")])
    return weights, biases, norms


def plain_rows(hidden: int, heads: int) -> np.ndarray:
    """Row of the weights that each warp [heads], step [head_dim / 32], pair [4] and element [8] multiplies by."""
    return np.arange(hidden).reshape(heads, hidden // heads // 32, 4, 8)


def attended_rows(hidden: int, heads: int) -> np.ndarray:
    """The same behind attention: a lane's sums of the product with V are its left operand as they are.

    Column n of V's tile j holds the head's dimension n * head_dim / 8 + j; two steps of 16 take the tiles 4 u to
    4 u + 3, each lane its columns 2 c and 2 c + 1 of them.
    """
    head_dim = hidden // heads
    head, step, pair, element = np.indices((heads, head_dim // 32, 4, 8))
    column, tile = 2 * pair + element % 2, 4 * step + element // 2
    return head * head_dim + column * (head_dim // 8) + tile
