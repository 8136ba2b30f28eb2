"""What the engine prints at start-up: which backend serves which op."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pjengine.pallas_kernels.backends import Backend, Target, choose, current_target
from pjengine.pallas_kernels.gated_mlp import api as gated_mlp
from pjengine.pallas_kernels.kv_write import api as kv_write
from pjengine.pallas_kernels.packed import api as packed
from pjengine.pallas_kernels.paged import api as paged
from pjengine.pallas_kernels.qkv_rotation import api as qkv_rotation
from pjengine.pallas_kernels.specs import AttentionSpec, GatedSpec, KVWriteSpec, RotationSpec


def describe_backends(
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: str,
    kv_dtype: str | None = None,
    *,
    backend: str = "auto",
    window: int | None = None,
    gated: GatedSpec | None = None,
    target: Target | None = None,
) -> list[tuple[str, str, str]]:
    """Which backend serves which op for a model of this shape, without running anything.

    Args:
      gated: the model's MLP where it is one that `gated_product` is for.
    Returns: (op, backend, reasons why the backends before it refuse) per op; backend "none" where all refuse.
    """
    kv_dtype = kv_dtype or dtype
    attention = AttentionSpec(heads, kv_heads, head_dim, dtype, kv_dtype, page_size, window=window)
    ops: list[tuple[str, Sequence[Backend], Any]] = [
        ("paged_attention (decode)", paged.BACKENDS, dataclasses.replace(attention, decode=True)),
        ("paged_attention (mixed)", paged.BACKENDS, attention),
        (
            "packed_attention",
            packed.BACKENDS,
            AttentionSpec(heads, kv_heads, head_dim, dtype, dtype, causal=False),
        ),
        ("rope_qkv", qkv_rotation.BACKENDS, RotationSpec(heads, kv_heads, head_dim, dtype)),
        ("rope_write_kv", kv_write.BACKENDS, KVWriteSpec(heads, kv_heads, head_dim, dtype, kv_dtype, page_size)),
    ]
    beside = {"rope_qkv": qkv_rotation.rotator(backend), "rope_write_kv": kv_write.writer(backend)}
    rows = []
    for op, backends, spec in ops:
        chosen, refusals = choose(beside.get(op, backend), backends, spec, target or current_target())
        rows.append((op, chosen.name if chosen else "none", "; ".join(f"{n}: {r}" for n, r in refusals)))
    if gated is not None:
        rows.append(_gated_row(gated, backend, target or current_target()))
    return rows


def _gated_row(spec: GatedSpec, backend: str, target: Target) -> tuple[str, str, str]:
    op, why = f"gated_product (from {gated_mlp.LEAST_TOKENS} tokens)", gated_mlp.mosaic_refusal(spec, target)
    if backend != "reference" and why is None:
        return op, "mosaic", ""
    silent = backend == "reference" or target.compute_capability is None
    return op, "reference", "" if silent else f"mosaic: {why}"
