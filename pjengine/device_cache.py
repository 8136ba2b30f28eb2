"""The device side of the paged KV cache: its arrays, and copies between its pages."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.kv_cache import PageCopy
from pjengine.step_inputs import CacheSpec, KVCache, LayerCache, cache_groups

_COPY_BATCH = 64  # page copies per call: one shape to compile


def cache_shapes(specs: Sequence[CacheSpec], pages: Sequence[int], page_size: int, dtype: Any) -> Any:
    """A KVCache of `jax.ShapeDtypeStruct`s. pages: of each group."""
    groups = cache_groups(specs)
    layers = []
    for spec, group in zip(specs, groups, strict=True):
        shape: Any = jax.ShapeDtypeStruct((pages[group], spec.kv_heads, page_size, spec.head_dim), dtype)
        layers.append(LayerCache(shape, shape))
    return KVCache(tuple(layers), groups)


def make_cache(shapes: KVCache) -> KVCache:
    """Zeroed pages on the default device."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def page_bytes(specs: Sequence[CacheSpec], page_size: int, dtype: Any) -> tuple[int, ...]:
    """Bytes of one page of each group, over all its layers."""
    groups = cache_groups(specs)
    sizes = [0] * (max(groups) + 1)
    for spec, group in zip(specs, groups, strict=True):
        sizes[group] += 2 * spec.kv_heads * page_size * spec.head_dim * jnp.dtype(dtype).itemsize
    return tuple(sizes)


def copy_pages(cache: KVCache, copies: Sequence[PageCopy]) -> KVCache:
    """Copies whole pages in every layer of their group; the cache passed in is donated."""
    for group in {copy.group for copy in copies}:
        pairs = [(copy.source, copy.target) for copy in copies if copy.group == group]
        for at in range(0, len(pairs), _COPY_BATCH):
            batch = np.zeros((_COPY_BATCH, 2), np.int32)  # the null page onto itself where there is nothing to copy
            batch[: len(pairs[at : at + _COPY_BATCH])] = pairs[at : at + _COPY_BATCH]
            cache = _copy(cache, batch, group)
    return cache


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def _copy(cache: KVCache, pairs: jax.Array, group: int) -> KVCache:
    def copy(pages: jax.Array) -> jax.Array:
        return pages.at[pairs[:, 1]].set(pages[pairs[:, 0]])

    layers = tuple(
        LayerCache(copy(layer.k), copy(layer.v)) if g == group else layer
        for layer, g in zip(cache.layers, cache.groups, strict=True)
    )
    return KVCache(layers, cache.groups)
