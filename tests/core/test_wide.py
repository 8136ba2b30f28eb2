"""Arithmetic beyond 32 bits against Python's integers."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pjengine.wide import Wide, cumulate, divide_up, less, minus, narrow, plus, scale, total, widen

wide = st.integers(0, 2**48 - 1)
word = st.integers(0, 2**32 - 1)


def make(*values: int) -> Wide:
    return Wide(
        jnp.asarray([v >> 16 for v in values], jnp.uint32), jnp.asarray([v & 0xFFFF for v in values], jnp.uint32)
    )


def read(x: Wide) -> list[int]:
    assert np.all(np.asarray(x.low) < 2**16)
    return [int(h) << 16 | int(low) for h, low in zip(np.asarray(x.high), np.asarray(x.low), strict=True)]


@settings(max_examples=40, deadline=None)
@given(a=wide, b=wide, fraction=word, divisor=st.integers(1, 2**24 - 1), small=st.integers(0, 2**31 - 1))
def test_arithmetic(a: int, b: int, fraction: int, divisor: int, small: int) -> None:
    a, b = max(a, b), min(a, b)
    assert read(minus(make(a), make(b))) == [a - b]
    assert [bool(x) for x in less(make(a, b, a), make(b, a, a))] == [False, b < a, False]
    product, inexact = scale(jnp.asarray([fraction], jnp.uint32), make(a))
    assert read(product) == [a * fraction >> 32]
    assert bool(inexact[0]) == (a * fraction % 2**32 > 0)
    assert read(plus(make(b % 2**47), jnp.asarray([small], jnp.uint32))) == [b % 2**47 + small]
    assert narrow(widen(jnp.asarray([small])))[0] == small
    quotient = a % (divisor * 2**30)
    assert divide_up(make(quotient), jnp.asarray([divisor]))[0] == -(-quotient // divisor)


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50))
def test_sums(values: list[int]) -> None:
    x: Any = jnp.asarray([values], jnp.int32)
    expected = np.cumsum(np.array(values, np.int64)).tolist()
    assert read(Wide(*(part[0] for part in cumulate(x)))) == expected
    assert read(total(x)) == expected[-1:]
