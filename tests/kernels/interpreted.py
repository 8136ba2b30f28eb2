"""Mosaic kernels on the CPU: JAX's interpreter for their control flow, plain JAX for what it cannot interpret.

The interpreter (private, unfinished) knows loops, copies, barriers and threads, but not layouts, accumulators that
start with a value, transposed operands, or inlined Mosaic code. `interpreted` puts plain JAX in the place of those, by
name; a kernel's loops, work lists, rings, masks and hand-overs between warpgroups run as they are.

A warpgroup that waits blocks one of XLA's threads, of which there are as many as cores: two warpgroups are safe on a
machine of two cores, three hang there unless the environment variable NPROC, read when JAX starts, asks for more.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call, params, shared_memory

from pjengine.models.layers import swiglu
from pjengine.pallas_kernels import apply_rope, flash, flash_joint, mosaic_common, rms_norm
from pjengine.pallas_kernels.gated_mlp import mosaic as mosaic_gated
from pjengine.pallas_kernels.head_norms import norm_heads
from pjengine.pallas_kernels.packed import long_steps, mosaic_long, mosaic_short, tiles
from pjengine.pallas_kernels.paged import decode_step, decode_tiles, mosaic_combine, mosaic_decode, mosaic_prefill
from pjengine.pallas_kernels.persistent_product import mosaic as mosaic_product
from pjengine.pallas_kernels.qkv_projection import mosaic as mosaic_qkv
from pjengine.pallas_kernels.specs import AttentionSpec, QKVSpec


class _Accumulator:
    """A wgmma accumulator as a value: kernels use one only inside one scope."""

    def __init__(self, value: jax.Array):
        self.value = value

    def __getitem__(self, index: Any) -> jax.Array:
        return self.value

    def __setitem__(self, index: Any, value: jax.Array) -> None:
        self.value = value


def _operand(x: Any) -> jax.Array:
    """The value of a wgmma operand: an array, or a reference that may end in a transposition."""
    if isinstance(x, jax.Array):
        return x
    transforms = getattr(x, "transforms", ())
    if transforms and type(transforms[-1]).__name__ in ("TransposeRef", "TransposeTransform"):
        return type(x)(x.ref, transforms[:-1])[...].T
    return x[...]


def _wgmma(acc: _Accumulator, a: Any, b: Any) -> None:
    acc.value += jnp.dot(_operand(a).astype(jnp.float32), _operand(b).astype(jnp.float32), precision="highest")


def _run_scoped(body: Callable[..., Any], *accumulators: Any, **scratch: Any) -> Any:
    if not accumulators:
        return pl.run_scoped(body, **scratch)
    return body(*(_Accumulator(jnp.zeros(shape, jnp.float32)) for shape in accumulators))


def _run_state(body: Callable[[Any], None]) -> Callable[[Any], Any]:
    def run(values: Any) -> Any:
        accumulators = jax.tree.map(_Accumulator, values)
        body(accumulators)
        return jax.tree.map(lambda acc: acc.value, accumulators)

    return run


class _Acc:
    def __new__(cls, shape: tuple[int, ...], dtype: Any) -> Any:
        return shape

    @staticmethod
    def init(value: jax.Array) -> jax.Array:
        return value


def _launch(
    body: Any,
    operands: tuple[Any, ...],
    *,
    scratch: dict[str, Any],
    grid: dict[str, int],
    name: str,
    warpgroups: int = 1,
    out_type: tuple[Any, ...] = (),
    cluster: None = None,
) -> Any:
    def kernel(*refs: Any) -> None:
        pl.run_scoped(lambda **scoped: body(*refs, **scoped), collective_axes="wg", **scratch)

    mesh = plgpu.Mesh(
        grid=tuple(grid.values()), grid_names=tuple(grid), num_threads=warpgroups, thread_name="wg", kernel_name=name
    )
    interpret = params.InterpretGPUParams(detect_races=False)
    return pl.kernel(kernel, out_type=out_type, mesh=mesh, interpret=interpret, name=name)(*operands)


def _deallocate(barrier: Any) -> None:
    """Without the interpreter's check that every last arrival is waited for: a ring's last ones need not be."""
    with barrier.cv:
        barrier.ref_count -= 1


def _store_rows(ref: Any, values: jax.Array, begin: jax.Array, end: jax.Array) -> None:
    @pl.loop(jnp.maximum(begin, 0), jnp.minimum(end, values.shape[0]))
    def _(row: jax.Array) -> None:
        ref[row] = lax.dynamic_index_in_dim(values, row, keepdims=False)


def _store_tile(smem: Any, ref: Any, values: jax.Array, begin: jax.Array, end: jax.Array) -> None:
    smem[...] = values
    _store_rows(ref, smem[...], begin, end)


def _mask_scores(scores: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    column = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return jnp.where((column >= low[:, None]) & (column < high[:, None]), scores, -jnp.inf)


def _store_staged_rows(staged: Any, ref: Any, begin: jax.Array, end: jax.Array, row_stride: int) -> None:
    _store_rows(ref, staged[...], begin, end)


def _add_parts(total: jax.Array, values: jax.Array) -> jax.Array:
    return total + values.reshape(values.shape[0], -1, total.shape[1]).sum(1)


def _rescale_if_needed(tile: jax.Array, factors: jax.Array) -> jax.Array:
    return tile * factors[:, None]


def _scaled_exp2(x: jax.Array, scale: Any, shift: jax.Array, dimension: int) -> jax.Array:
    return jnp.exp2(x * scale - lax.broadcast_in_dim(shift, x.shape, [dimension]))


def _clear_rows_from(smem: Any, end: jax.Array) -> None:
    _clear_tokens_outside(smem, jnp.int32(0), end)


def _clear_tokens_outside(smem: Any, begin: jax.Array, end: jax.Array) -> None:
    row = lax.broadcasted_iota(jnp.int32, smem.shape, 0)
    smem[...] = jnp.where((row >= begin) & (row < end), smem[...], 0).astype(smem.dtype)


def _clear_memory(ref: Any, nbytes: int) -> None:
    ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _stage_queries(queries: Any, smem: Any, *, permuted: bool) -> None:
    values = queries[...].astype(smem.dtype)
    smem[...] = jnp.pad(values, ((0, smem.shape[0] - values.shape[0]), (0, 0)), mode="edge")


def _stage_projection(
    qkv: Any,
    new: Any,
    pages: tuple[Any, Any],
    row: jax.Array,
    head: jax.Array,
    closes: jax.Array,
    smem: Any,
    token_smem: Any,
    *,
    spec: AttentionSpec,
    norm_eps: float | None,
) -> None:
    cos, sin, slot = new.cos[row], new.sin[row], new.slots[row]

    def turned(heads: jax.Array, norm: int) -> jax.Array:
        if norm_eps is not None:
            heads = rms_norm(heads, new.norms[norm][...], norm_eps)
        return apply_rope(heads[None], cos[None], sin[None])[0]

    smem[pl.ds(0, spec.group)] = turned(qkv[row, pl.ds(head * spec.group, spec.group)], 0)
    smem[pl.ds(spec.group, smem.shape[0] - spec.group)] = jnp.full((smem.shape[0] - spec.group, spec.head_dim), jnp.nan)
    key = turned(qkv[row, pl.ds(spec.heads + head, 1)], 1)[0]
    token = (key, qkv[row, spec.heads + spec.kv_heads + head])

    @pl.when(closes == 1)
    def _() -> None:
        for part, (ref, values) in enumerate(zip(pages, token, strict=True)):
            token_smem[part] = values

            @pl.when(slot >= 0)
            def _(ref: Any = ref, values: jax.Array = values) -> None:
                ref[slot // ref.shape[2], head, slot % ref.shape[2]] = values


def _put_token(values: Any, smem: Any, row: jax.Array) -> None:
    smem[row] = values[...]


def _reduce_tokens(values: jax.Array, scratch: Any, *, largest: bool) -> jax.Array:
    return values.max(0) if largest else values.sum(0)


def _store_weights(smem: Any, weights: jax.Array) -> None:
    smem[...] = weights.T


def _store_columns(ref: Any, values: jax.Array, group: int, head_dim: int, *, permuted: bool) -> None:
    ref[pl.ds(0, group * head_dim)] = values[:head_dim].T[:group].reshape(-1).astype(ref.dtype)


def _add_product(sums: jax.Array, x: Any, weights: Any) -> jax.Array:
    both = jnp.concatenate(list(weights[...].astype(jnp.float32)), axis=1)
    return sums + jnp.dot(x[...].astype(jnp.float32), both, precision="highest")


def _load_angles(cos: Any, sin: Any, row: jax.Array) -> jax.Array:
    rows = jnp.minimum(row + jnp.arange(64), cos.shape[0] - 1)
    return jnp.concatenate([cos[...][rows], sin[...][rows]], axis=1)


def _turn_heads(
    sums: jax.Array, angles: jax.Array, bias: Any, norms: Any, first: jax.Array, *, block: int, spec: QKVSpec
) -> jax.Array:
    values = sums[:, block * 128 : (block + 1) * 128]
    if bias is not None:
        values += bias[pl.ds(first, 128)].astype(jnp.float32)
    rotation = jnp.split(angles, 2, axis=1)
    heads, done = values.reshape(64, -1, spec.head_dim), []
    q_norm, k_norm = [weight[...] for weight in norms] or (None, None)
    for i in range(heads.shape[1]):
        own, head = heads[:, i : i + 1], first // spec.head_dim + i
        q, k = norm_heads(own, own, q_norm, k_norm, spec.norm_eps)
        turned = apply_rope(jnp.where(head < spec.heads, q, k).astype(jnp.float32), *rotation)
        done.append(jnp.where(head < spec.heads + spec.kv_heads, turned, own))
    return jnp.concatenate(done, axis=1).reshape(64, 128).astype(spec.dtype)


def _store_in_pages(
    staged: Any, k_pages: Any, v_pages: Any, slots: Any, row: jax.Array, head: jax.Array, *, spec: QKVSpec
) -> None:
    heads = staged[...].reshape(64, -1, spec.head_dim)
    page_size = k_pages.shape[2]
    of_k = head < spec.kv_heads
    for pages, wanted in ((k_pages, of_k), (v_pages, ~of_k)):

        @pl.loop(0, jnp.where(wanted, jnp.clip(slots.shape[0] - row, 0, 64), 0))
        def _(i: jax.Array, pages: Any = pages) -> None:
            slot = slots[row + i]

            @pl.when(slot >= 0)
            def _() -> None:
                for j in range(heads.shape[1]):
                    value = lax.dynamic_index_in_dim(heads[:, j], i, keepdims=False)
                    pages[slot // page_size, head % spec.kv_heads + j, slot % page_size] = value


def _last_to_arrive(counters: Any, index: jax.Array, pieces: jax.Array, flag: Any) -> None:
    """Not atomic: the interpreter runs one block after the other, so one worker per block must be all there is."""
    arrived = counters[index] + 1
    last = arrived == pieces
    counters[index] = jnp.where(last, 0, arrived)
    flag[0] = last.astype(jnp.int32)


def _value_fragments(smem: Any) -> jax.Array:
    rows = decode_tiles.padded_rows(smem.shape[1])
    return jnp.pad(smem[...].astype(jnp.float32).T, ((0, rows - smem.shape[1]), (0, 0)))


_SHARED = {
    "launch": _launch,
    "tiled_smem": lambda shape, dtype: plgpu.SMEM(shape, dtype),
    "tile": lambda value, columns, rows=64: jnp.full((rows, columns), value, jnp.float32),
    "column": lambda value, rows=64: jnp.full((rows,), value, jnp.float32),
    "tile_iota": lambda shape, dimension: lax.broadcasted_iota(jnp.int32, shape, dimension),
    "load_whole": lambda ref, layout, optimized=True: ref[...],
    "store_tile": _store_tile,
    "mask_scores": _mask_scores,
    "store_staged_rows": _store_staged_rows,
    "add_parts": _add_parts,
    "rescale_if_needed": _rescale_if_needed,
    "widen_with_zeros": lambda tile, columns: jnp.pad(tile, ((0, 0), (0, columns - tile.shape[1]))),
    "scaled_exp2": _scaled_exp2,
    "clear_rows_from": _clear_rows_from,
    "clear_memory": _clear_memory,
    "store_prefix": lambda ref, values, layout, size: ref.__setitem__(..., values[:size]),
    "weights_scratch": lambda stages, columns, dtype: plgpu.SMEM((stages, 2, 64, columns), dtype),
    "add_product": _add_product,
    "finish_products": lambda sums: sums,
    "swiglu_halves": swiglu,
    "load_angles": _load_angles,
    "turn_heads": _turn_heads,
    "store_in_pages": _store_in_pages,
    "widen_block": lambda source, target: target.__setitem__(..., source[...].astype(target.dtype)),
}
_NEW_TOKENS = {"stage_projection": _stage_projection, "put_token": _put_token}
_TILES = {
    "stage_queries": _stage_queries,
    "key_fragments": lambda smem: smem[...].astype(jnp.float32),
    "value_fragments": _value_fragments,
    "reduce_tokens": _reduce_tokens,
    "store_weights": _store_weights,
    "store_columns": _store_columns,
    "load_vector": lambda ref, columns: jnp.pad(ref[...], (0, columns - ref.shape[0]), mode="edge"),
    "load_spread": lambda ref, size, layout, group, head_dim: ref[...][
        jnp.minimum(jnp.arange(size) // head_dim, group - 1)
    ],
    "store_vector": lambda ref, values: ref.__setitem__(..., values),
    "clear_tokens_outside": _clear_tokens_outside,
    "last_to_arrive": _last_to_arrive,
}


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced inside run on the CPU."""
    pallas = types.SimpleNamespace(**{**vars(pl), "run_scoped": _run_scoped, "run_state": _run_state})
    mosaic = types.SimpleNamespace(
        **{
            **vars(plgpu),
            "ACC": _Acc,
            "wgmma": _wgmma,
            "wgmma_wait": lambda n: None,
            "wgmma_accumulator_load": lambda acc, wait_n=0: acc[...],
            "layout_cast": lambda x, layout: x,
            "broadcasted_iota": lambda dtype, shape, dimension, layout: lax.broadcasted_iota(dtype, shape, dimension),
        }
    )
    with contextlib.ExitStack() as stack:
        kernels = (
            mosaic_decode,
            decode_step,
            mosaic_prefill,
            mosaic_combine,
            mosaic_short,
            mosaic_long,
            long_steps,
            mosaic_gated,
            mosaic_product,
            mosaic_qkv,
        )
        for module in (flash, flash_joint, mosaic_common, tiles, *kernels):
            for name, value in {**_SHARED, **_NEW_TOKENS, "pl": pallas, "plgpu": mosaic}.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        for name, value in _TILES.items():
            stack.enter_context(mock.patch.object(decode_tiles, name, value))
        stack.enter_context(mock.patch.object(shared_memory.Barrier, "deallocate", _deallocate))
        try:
            yield
        except BaseException:
            interpret_pallas_call.reset_gpu_interpret_mode_state()
            raise
