"""Sums beyond 32 bits without 64-bit types, which JAX has only as a global switch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_HALF = 0xFFFF


class Wide(NamedTuple):
    """high * 2^16 + low. uint32 arrays, low < 2^16: up to 48 bits, never negative."""

    high: jax.Array
    low: jax.Array


def widen(x: jax.Array) -> Wide:
    """From int32 of at least 0."""
    bits = x.astype(jnp.uint32)
    return Wide(bits >> 16, bits & _HALF)


def narrow(x: Wide) -> jax.Array:
    """To int32, for values that fit."""
    return ((x.high << 16) | x.low).astype(jnp.int32)


def total(x: jax.Array) -> Wide:
    """Sum over the last axis, of up to 2^16 values, int32 of at least 0."""
    return jax.tree.map(lambda sums: sums[0], totals([x]))


def totals(arrays: Sequence[jax.Array]) -> Wide:
    """`total` of each of several arrays of one shape [..., n] in one kernel: [len(arrays), ...]."""
    wide = [widen(x) for x in arrays]
    parts = (*(x.high for x in wide), *(x.low for x in wide))
    sums = jax.lax.reduce(parts, (jnp.uint32(0),) * len(parts), add_each, (parts[0].ndim - 1,))
    return _carry(jnp.stack(sums[: len(wide)]), jnp.stack(sums[len(wide) :]))


def cumulate(x: jax.Array) -> Wide:
    """Running sums along the last axis, of up to 2^16 values, int32 of at least 0."""
    wide = widen(x)
    return _carry(jnp.cumsum(wide.high, axis=-1), jnp.cumsum(wide.low, axis=-1))


def less(a: Wide, b: Wide) -> jax.Array:
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def plus(a: Wide, b: jax.Array) -> Wide:
    """b: uint32 below 2^31."""
    return _carry(a.high, a.low + b)


def minus(a: Wide, b: Wide) -> Wide:
    """For a >= b."""
    borrow = (a.low < b.low).astype(jnp.uint32)
    return Wide(a.high - b.high - borrow, (a.low - b.low) & _HALF)


def scale(fraction: jax.Array, x: Wide) -> tuple[Wide, jax.Array]:
    """fraction / 2^32 * x, rounded down; and whether that dropped anything. fraction: uint32.

    Schoolbook multiplication in digits of 16 bits; no sum below overflows 32.
    """
    f1, f0 = fraction >> 16, fraction & _HALF
    x2, x1, x0 = x.high >> 16, x.high & _HALF, x.low
    lowest = f0 * x0
    a = f0 * x1 + (lowest >> 16)
    b = f1 * x0 + (a & _HALF)
    c = f0 * x2 + (a >> 16)
    d = f1 * x1 + (b >> 16)
    result = _carry(f1 * x2 + (c >> 16) + (d >> 16), (c & _HALF) + (d & _HALF))
    return result, ((lowest | b) & _HALF) > 0


def divide_up(x: Wide, divisor: jax.Array) -> jax.Array:
    """x / divisor rounded up, int32, for quotients that fit. divisor: int32 in 1 .. 2^24 - 1.

    Long division in digits of 8 bits.
    """
    divisor = divisor.astype(jnp.uint32)
    quotient = rest = jnp.zeros_like(divisor)
    for digits, shift in ((x.high, 24), (x.high, 16), (x.high, 8), (x.high, 0), (x.low, 8), (x.low, 0)):
        rest = (rest << 8) | ((digits >> shift) & 0xFF)
        quotient = (quotient << 8) | (rest // divisor)
        rest = rest % divisor
    return (quotient + (rest > 0)).astype(jnp.int32)


def _carry(high: jax.Array, low: jax.Array) -> Wide:
    return Wide(high + (low >> 16), low & _HALF)


def add_each(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)
