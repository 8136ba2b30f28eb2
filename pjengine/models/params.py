"""ParamSpec: a weight is declared once; init, loading, sharding and memory planning follow from the declaration."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One weight of a model.

    Attributes:
      shape: of the array as `forward` uses it (matrices as [in, out]: `x @ w`).
      axes: a logical axis name (or None) per dimension, for sharding: "vocab", "embed", "heads", "mlp", and "qkv" and
        "gate_up", whose parts stand side by side.
      init: "normal" (std 0.02), "zeros" or "ones".
      sources: checkpoint tensor names whose rows, concatenated along axis 0 as stored ([out, in]), make this weight;
        more than one for a fused weight (Q, K, V). Transposed on loading where `transpose`.
      transpose: the checkpoint stores [out, in] (torch.nn.Linear).
      dtype: overrides the model's dtype (for weights that must stay float32); None: the model's.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    sources: tuple[str, ...]
    init: str = "normal"
    transpose: bool = False
    dtype: Any = None

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"axes: {self.axes} must name every dimension of shape {self.shape}")
        if self.init not in ("normal", "zeros", "ones"):
            raise ValueError(f"init: expected normal, zeros or ones, got {self.init!r}")

    def nbytes(self, dtype: Any) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype or dtype).itemsize


def linear_specs(
    name: str,
    inputs: tuple[str | None, int],
    outputs: tuple[str | None, int],
    modules: Sequence[str],
    *,
    bias: bool,
) -> dict[str, ParamSpec]:
    """Weight and, where asked for, bias ("{name}_bias") of a linear layer; several modules fuse side by side.

    Args:
      inputs, outputs: logical axis and size.
      modules: checkpoint names of the torch.nn.Linear modules, without ".weight" and ".bias".
    """
    (axis_in, size_in), (axis_out, size_out) = inputs, outputs
    weights, biases = (tuple(f"{module}.{kind}" for module in modules) for kind in ("weight", "bias"))
    specs = {name: ParamSpec((size_in, size_out), (axis_in, axis_out), weights, transpose=True)}
    if bias:
        specs[f"{name}_bias"] = ParamSpec((size_out,), (axis_out,), biases, init="zeros")
    return specs


def norm_specs(name: str, module: str, size: int) -> dict[str, ParamSpec]:
    """Weight and bias ("{name}_bias") of a layer norm. module: checkpoint name of the torch.nn.LayerNorm."""
    return {
        name: ParamSpec((size,), (None,), (f"{module}.weight",), init="ones"),
        f"{name}_bias": ParamSpec((size,), (None,), (f"{module}.bias",), init="zeros"),
    }


def is_spec(x: object) -> bool:
    return isinstance(x, ParamSpec)


def init_params(specs: Any, dtype: Any, seed: int = 0) -> Any:
    """Random weights of the declared shapes, generated on the default device.

    What stands together in one element of a list (a layer) is one call of a program, which equal layers share: few
    programs to compile and few calls, while other threads trace the model.

    Args:
      specs: a pytree with ParamSpec leaves (dicts and lists).
      dtype: of every weight that does not declare its own.
    Returns: the same tree with arrays for specs.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)
    blocks: dict[Any, list[int]] = {}
    for place, (path, _) in enumerate(leaves):
        elements = [i for i, key in enumerate(path) if isinstance(key, jax.tree_util.SequenceKey)]
        blocks.setdefault(path[: elements[-1] + 1] if elements else (), []).append(place)
    seeds = np.random.SeedSequence(seed).generate_state(max(len(leaves), 1))
    weights: list[Any] = [None] * len(leaves)
    for places in blocks.values():
        block = tuple((s.shape, jnp.dtype(s.dtype or dtype).name, s.init) for _, s in (leaves[i] for i in places))
        for place, drawn in zip(places, _draw_block(seeds[places], block), strict=True):
            weights[place] = drawn
    return jax.tree.unflatten(treedef, weights)


@functools.partial(jax.jit, static_argnums=1)
def _draw_block(seeds: jax.Array, block: tuple[tuple[tuple[int, ...], str, str], ...]) -> list[jax.Array]:
    """Arrays of (shape, dtype, init). seeds: uint32, one for each."""
    return [_draw(seeds[i], *description) for i, description in enumerate(block)]


def _draw(seed: jax.Array, shape: tuple[int, ...], dtype: str, init: str) -> jax.Array:
    if init != "normal":
        return jnp.full(shape, 1.0 if init == "ones" else 0.0, dtype)
    # A hash of an element's place: compiles in half the time of JAX's generators, and is as good for weights.
    bits = _mix(seed)
    for axis in range(len(shape)):
        bits = _mix(bits + jax.lax.broadcasted_iota(jnp.uint32, shape, axis))
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1.0  # exact, and never at -1 or 1
    return (jax.lax.erf_inv(uniform) * (0.02 * math.sqrt(2))).astype(dtype)


def _mix(bits: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit of the result depends on every bit (Wellons' lowbias32)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def total_bytes(specs: Any, dtype: Any) -> int:
    """Bytes of all weights of a spec tree."""
    return sum(s.nbytes(dtype) for s in jax.tree.leaves(specs, is_leaf=is_spec))
