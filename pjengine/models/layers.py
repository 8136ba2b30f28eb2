"""Building blocks of transformer models: pure functions of arrays, float32 wherever a sum or a square is taken."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pjengine.pallas_kernels import (
    Projection,
    gated_product,
    packed_attention_qkv,
    paged_attention,
    paged_attention_qkv,
    qkv_product,
    qkv_product_paged,
    rope_qkv,
    serves_gated_product,
    serves_qkv_product,
)
from pjengine.step_inputs import LayerCache, StepInputs


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x [..., in] times weight [in, out], plus bias [out], in x's dtype; sums are float32."""
    y = jnp.dot(x, weight, precision=dot_precision(x))
    return y if bias is None else y + bias


def unembed(x: jax.Array, weight: jax.Array) -> jax.Array:
    """float32 logits [N, vocab] of x [N, hidden] against weight [hidden, vocab]."""
    return jnp.dot(x, weight, precision=dot_precision(x), preferred_element_type=jnp.float32)


def dot_precision(x: jax.Array) -> jax.lax.Precision:
    """GPUs multiply float32 as TF32 unless told otherwise; narrower types lose nothing by default."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def swiglu(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up (arXiv:2002.05202) of gate and up side by side: [T, 2 * mlp] to [T, mlp]."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def linear_swiglu(x: jax.Array, weight: jax.Array, bias: jax.Array | None, *, backend: str) -> jax.Array:
    """swiglu(linear(x, weight, bias)): [T, hidden] and [hidden, 2 * mlp] to [T, mlp].

    Where one kernel is faster, it does both, and the activation is that of the float32 sums.

    Args:
      backend: as in StepInputs.
    """
    if bias is None and serves_gated_product(x, weight, backend):
        return gated_product(x, weight)
    return swiglu(linear(x, weight, bias))


def geglu(gate_up: jax.Array) -> jax.Array:
    """gelu(gate) * up (arXiv:2002.05202), by erf, of gate and up side by side: [T, 2 * mlp] to [T, mlp]."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (gelu(gate) * up).astype(gate_up.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU (arXiv:1606.08415, by erf, not its tanh approximation), in float32; x's dtype out."""
    # jax.nn.gelu takes erfc, two branches of polynomials, for digits of the left tail that no product of ours keeps.
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def linear_gelu(x: jax.Array, weight: jax.Array, bias: jax.Array | None, *, epilogue: bool) -> jax.Array:
    """gelu(linear(x, weight, bias)).

    Args:
      epilogue: for 16-bit types, write GELU's tanh form, which XLA gives to cuBLASLt's epilogue. That applies it to the
        float32 sum: its own error (5e-4 at most) is far below that of rounding the sum before an exact GELU.
    """
    y = linear(x, weight, bias)
    return jax.nn.gelu(y, approximate=True) if epilogue and x.dtype.itemsize == 2 else gelu(y)


def split_heads(qkv: jax.Array, num_heads: int, num_kv_heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Fused [T, (heads + 2 * kv_heads) * head_dim] to q [T, heads, head_dim] and k, v [T, kv_heads, head_dim]."""
    heads = qkv.reshape(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)
    q, k, v = jnp.split(heads, (num_heads, num_heads + num_kv_heads), axis=1)
    return q, k, v


def causal_attention_qkv(
    x: jax.Array,
    projection: Projection,
    rotation: tuple[jax.Array, jax.Array],
    inputs: StepInputs,
    pages: LayerCache | None,
    *,
    window: int | None,
    group: int,
) -> tuple[jax.Array, LayerCache | None]:
    """Attends, q and k rotated, over the layer's pages or, where those are None, inside the step's own tokens.

    Args:
      x: [T, hidden], of which the projection makes q, k and v.
      rotation: cos and sin, float32 [T, head_dim // 2].
      window: as in CacheSpec.
      group: which of the inputs' write slots and block tables are the layer's.
    Returns: [T, heads, head_dim], and the pages with this step's k and v written; those passed in are dead (donated).
    """
    if pages is None:
        return attention_qkv(x, projection, rotation, inputs, causal=True, window=window), None
    (cos, sin), slots = rotation, inputs.write_slots[group]
    attend: dict[str, Any] = {
        "query_starts": inputs.query_starts,
        "kv_lens": inputs.kv_lens,
        "block_tables": inputs.block_tables[group],
        "scale": projection.head_dim**-0.5,
        "decode": inputs.decode,
        "window": window,
        "backend": inputs.backend,
    }
    if serves_qkv_product(x, projection, pages.k, backend=inputs.backend):
        q, k_pages, v_pages = qkv_product_paged(x, projection, cos, sin, pages.k, pages.v, slots)
        attended = paged_attention(q, k_pages, v_pages, **attend)
    else:
        qkv = _project(x, projection)
        attend |= _norms(projection)
        attended, k_pages, v_pages = paged_attention_qkv(qkv, cos, sin, pages.k, pages.v, slots, **attend)
    return attended, LayerCache(k_pages, v_pages)


def attention_qkv(
    x: jax.Array,
    projection: Projection,
    rotation: tuple[jax.Array, jax.Array],
    inputs: StepInputs,
    *,
    causal: bool = False,
    window: int | None = None,
) -> jax.Array:
    """Attends inside each of the step's sequences, q and k rotated: [T, heads, head_dim].

    Args:
      x, projection, rotation: as in `causal_attention_qkv`.
      causal, window: as in `packed_attention`.
    """
    if serves_qkv_product(x, projection, backend=inputs.backend):
        qkv = qkv_product(x, projection, *rotation)
    else:
        kv_heads, norms = projection.kv_heads, _norms(projection)
        qkv = rope_qkv(_project(x, projection), *rotation, kv_heads=kv_heads, **norms, backend=inputs.backend)
    return packed_attention_qkv(
        qkv,
        inputs.query_starts,
        kv_heads=projection.kv_heads,
        scale=projection.head_dim**-0.5,
        causal=causal,
        window=window,
        backend=inputs.backend,
    )


def _project(x: jax.Array, projection: Projection) -> jax.Array:
    """[T, heads + 2 * kv_heads, head_dim], neither normalised nor rotated."""
    return linear(x, projection.weight, projection.bias).reshape(x.shape[0], -1, projection.head_dim)


def _norms(projection: Projection) -> dict[str, Any]:
    return {"q_norm": projection.q_norm, "k_norm": projection.k_norm, "eps": projection.eps}
