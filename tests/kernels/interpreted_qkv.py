"""`qkv_product` in JAX's interpreter against float32; `test_interpreted` runs it as a process of its own.

Clusters of one, as for the gated product, and whole tiles: the interpreter's copies must stay inside their arrays.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.pallas_kernels.kv_write.reference import rope_write_kv_qkv
from pjengine.pallas_kernels.persistent_product.tiles import ProductConfig
from pjengine.pallas_kernels.qkv_projection.mosaic import qkv_product, qkv_product_paged
from pjengine.pallas_kernels.qkv_rotation.reference import rope_qkv
from pjengine.pallas_kernels.specs import KVWriteSpec, QKVSpec, RotationSpec
from tests.kernels.interpreted import interpreted
from tests.kernels.ragged_cases import relative_error

PAGE_SIZE = 16


def check(tokens: int, spec: QKVSpec, *, sms: int) -> None:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    heads, kv_heads, head_dim, eps = spec.heads, spec.kv_heads, spec.head_dim, spec.norm_eps
    x, weight = normal(tokens, spec.hidden), normal(spec.hidden, spec.width)
    turns = jnp.asarray(rng.uniform(0, 7, (tokens, head_dim // 2)), jnp.float32)
    angles = (jnp.cos(turns), jnp.sin(turns))
    norms = () if eps is None else (normal(head_dim), normal(head_dim))
    bias = (normal(spec.width),) if spec.bias else ()
    k_pages, v_pages = (normal(-(-tokens // PAGE_SIZE) + 1, kv_heads, PAGE_SIZE, head_dim) for _ in range(2))
    slots = jnp.asarray(np.where(np.arange(tokens) % 5 == 3, -1, rng.permutation(tokens + PAGE_SIZE)[:tokens]), "int32")
    pages = (k_pages, v_pages, slots)
    config = ProductConfig(sms, cluster=1, stages=3)
    with interpreted():
        if spec.kv_dtype is None:
            out = [qkv_product(x, weight, angles, norms, bias, spec=spec, config=config)]
        else:
            out = list(qkv_product_paged(x, weight, angles, norms, bias, *pages, spec=spec, config=config))
        jax.block_until_ready(out)
    wide = jnp.dot(x.astype(jnp.float32), weight.astype(jnp.float32), precision="highest")
    wide = (wide + (bias[0].astype(jnp.float32) if bias else 0)).reshape(tokens, -1, head_dim)
    q_norm, k_norm = norms or (None, None)
    if spec.kv_dtype is None:
        rotation = RotationSpec(heads, kv_heads, head_dim, norm_eps=eps)
        expected = [rope_qkv(wide, *angles, q_norm, k_norm, spec=rotation)]
    else:
        write = KVWriteSpec(heads, kv_heads, head_dim, norm_eps=eps)
        written = rope_write_kv_qkv(wide, *angles, *pages, None, None, q_norm, k_norm, spec=write)
        expected = list(written)
    for got, right in zip(out, expected, strict=True):
        error = relative_error(got.astype(jnp.float32), np.asarray(right, np.float32))
        if not error < 1e-2:
            raise AssertionError(f"{tokens} tokens, {spec}, {sms} SMs: relative error {error}")


if __name__ == "__main__":
    check(256, QKVSpec(256, 2, 1, 128, norm_eps=1e-6), sms=2)
    check(128, QKVSpec(64, 4, 2, 64, bias=True), sms=3)  # q, k and v in one tile; an SM with nothing to do
    check(128, QKVSpec(192, 2, 1, 128, kv_dtype="bfloat16", norm_eps=1e-6), sms=1)
