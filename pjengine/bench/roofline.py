"""What the device can do, measured: the yardstick of every other figure."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

_REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Roofline:
    """copy_bandwidth: bytes read and written per second by a device copy. gemm_rate: bf16 FLOP/s of an 8192³
    product.
    """

    copy_bandwidth: float
    gemm_rate: float

    def __str__(self) -> str:
        return f"copy {self.copy_bandwidth / 1e12:.3g} TB/s, bf16 GEMM {self.gemm_rate / 1e12:.3g} TFLOP/s"


def measure() -> Roofline:
    """Both ceilings of the default device; small sizes on a CPU, where they say little."""
    gpu = jax.default_backend() == "gpu"
    elements, side = (1 << 29, 8192) if gpu else (1 << 23, 512)
    source = jax.random.bits(jax.random.key(0), (elements,), jnp.uint32)
    copy = jax.jit(lambda x: x ^ jnp.uint32(1))
    bandwidth = 2 * source.nbytes / _seconds(copy, source)
    del source
    a = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16)
    rate = 2 * side**3 / _seconds(jax.jit(lambda x: x @ x), a)
    return Roofline(bandwidth, rate)


def _seconds(function: Callable[[jax.Array], jax.Array], argument: jax.Array) -> float:
    """Mean over back-to-back calls, after a warm-up."""
    function(argument).block_until_ready()
    started = time.perf_counter()
    results = [function(argument) for _ in range(_REPEATS)]
    results[-1].block_until_ready()
    return (time.perf_counter() - started) / _REPEATS
