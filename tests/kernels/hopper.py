"""Tracing and lowering for an H200 on a machine that has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def lower_for_hopper(function: Callable[..., Any], *shapes: tuple[tuple[int, ...], str], **jit_options: Any) -> str:
    """The StableHLO of jit(function), lowered for CUDA; shapes: (shape, dtype) per argument. Runs Mosaic's compiler."""
    return lowered_for_hopper(function, *shapes, **jit_options).as_text()


def lowered_for_hopper(
    function: Callable[..., Any], *shapes: tuple[tuple[int, ...], str], **jit_options: Any
) -> jax.stages.Lowered:
    """As `lower_for_hopper`, before it is text."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes]
    with on_hopper():
        return jax.jit(function, **jit_options).trace(*arguments).lower(lowering_platforms=("cuda",))


def on_hopper() -> Any:
    """A context in which what is traced is traced for an H200."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (jax.sharding.AxisType.Explicit,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)
