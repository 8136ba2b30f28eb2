"""Each kernel once, over a small ragged batch and nothing else: what compute-sanitizer runs (`gpu_check --sanitizer`).

python3 -m tests.gpu.small_cases decode mixed float8 projection packed write stack
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.errors import KernelUnavailable
from pjengine.pallas_kernels import (
    encoder_stack,
    pack_layers,
    packed_attention_qkv,
    paged_attention,
    paged_attention_qkv,
    rope_write_kv_qkv,
)
from tests.kernels.encoder_layers import random_layers, random_rows
from tests.kernels.ragged_cases import paged_case

HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 64, 16


def attend(query_lens: list[int], kv_lens: list[int], kv_dtype: str = "bfloat16") -> jax.Array:
    decode = all(n == 1 for n in query_lens)
    case = paged_case(
        np.random.default_rng(0),
        query_lens,
        kv_lens,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        page_size=PAGE,
        dtype="bfloat16",
        kv_dtype=kv_dtype,
    )
    op = functools.partial(paged_attention, scale=case.scale, decode=decode, backend="mosaic")
    return jax.jit(op)(*case.arrays())


def projection() -> jax.Array:
    """Decode that rotates and writes its tokens: rows at both ends of pages and blocks, and one without tokens."""
    lens = [40, 1, 129, 0, 64]
    case = paged_case(
        np.random.default_rng(0),
        [1] * len(lens),
        lens,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        page_size=PAGE,
        dtype="bfloat16",
    )
    qkv = random_rows(len(lens), HEADS + 2 * KV_HEADS, HEAD_DIM)
    angles = jnp.linspace(0, 6, len(lens) * HEAD_DIM // 2).reshape(len(lens), -1)
    op = functools.partial(paged_attention_qkv, scale=case.scale, decode=True, backend="mosaic")
    _, k, v, *rows = case.arrays()
    return jax.jit(op)(qkv, jnp.cos(angles), jnp.sin(angles), k, v, jnp.asarray(case.last_slots()), *rows)[0]


def packed() -> jax.Array:
    starts = jnp.asarray([0, 5, 80, 81, 200], jnp.int32)
    op = functools.partial(packed_attention_qkv, kv_heads=HEADS, scale=HEAD_DIM**-0.5, backend="mosaic")
    return jax.jit(op)(random_rows(208, 3 * HEADS, HEAD_DIM), starts)


def write() -> jax.Array:
    qkv = random_rows(24, HEADS + 2 * KV_HEADS, HEAD_DIM)
    angles = jnp.linspace(0, 6, 24 * HEAD_DIM // 2).reshape(24, -1)
    pages = jnp.zeros((4, KV_HEADS, PAGE, HEAD_DIM), jnp.bfloat16)
    slots = jnp.arange(PAGE, PAGE + 24, dtype=jnp.int32)
    op = functools.partial(rope_write_kv_qkv, backend="mosaic")
    return jax.jit(op)(qkv, jnp.cos(angles), jnp.sin(angles), pages, pages + 0, slots)[0]


def stack() -> jax.Array:
    packed_layers = pack_layers(random_layers(1, 384), 12)
    starts = jnp.asarray([0, 5, 12, 12], jnp.int32)
    return jax.jit(functools.partial(encoder_stack, eps=1e-12))(random_rows(16, 384), starts, packed_layers)


CASES: dict[str, Callable[[], jax.Array]] = {
    "decode": lambda: attend([1, 1, 1], [40, 1, 70]),
    "mixed": lambda: attend([1, 30, 9], [40, 30, 70]),
    "float8": lambda: attend([1, 30, 9], [40, 30, 70], "float8_e4m3fn"),
    "projection": projection,
    "packed": packed,
    "write": write,
    "stack": stack,
}


def main(names: list[str]) -> None:
    if unknown := sorted(set(names) - set(CASES)):
        raise SystemExit(f"small_cases: no case is called {', '.join(unknown)}; there are {', '.join(CASES)}")
    for name in names or list(CASES):
        try:
            result = np.asarray(CASES[name]().astype(jnp.float32))
        except KernelUnavailable as error:
            raise SystemExit(f"small_cases: {name}: {error}") from None
        if not np.isfinite(result).all():
            raise SystemExit(f"small_cases: {name}: not all results are finite")
        print(f"{name}: {result.shape}, finite")


if __name__ == "__main__":
    main(sys.argv[1:])
