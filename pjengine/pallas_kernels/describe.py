"""What the engine prints at start-up: which backend serves which op."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pjengine.pallas_kernels.backends import Backend, Target, choose, current_target
from pjengine.pallas_kernels.encoder_stack import api as encoder_stack
from pjengine.pallas_kernels.gated_mlp import api as gated_mlp
from pjengine.pallas_kernels.gated_mlp.tiles import describe_tokens
from pjengine.pallas_kernels.kv_write import api as kv_write
from pjengine.pallas_kernels.packed import api as packed
from pjengine.pallas_kernels.paged import api as paged
from pjengine.pallas_kernels.qkv_projection import api as qkv_projection
from pjengine.pallas_kernels.qkv_projection.tiles import LEAST_TOKENS
from pjengine.pallas_kernels.qkv_rotation import api as qkv_rotation
from pjengine.pallas_kernels.specs import (
    AttentionSpec,
    EncoderStackSpec,
    GatedSpec,
    KVWriteSpec,
    QKVSpec,
    RotationSpec,
)


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
    qkv: QKVSpec | None = None,
    target: Target | None = None,
) -> list[tuple[str, str, str]]:
    """Which backend serves which op for a model of this shape, without running anything.

    Args:
      gated: the model's MLP where it is one that `gated_product` is for; qkv: its projection where `qkv_product_paged`
        may serve.
    Returns: (op, backend, reasons why the backends before it refuse) per op; backend "none" where all refuse.
    """
    kv_dtype, target = kv_dtype or dtype, target or current_target()
    attention = AttentionSpec(heads, kv_heads, head_dim, dtype, kv_dtype, page_size, window=window)
    packed_spec = AttentionSpec(heads, kv_heads, head_dim, dtype, dtype, causal=False)
    write = KVWriteSpec(heads, kv_heads, head_dim, dtype, kv_dtype, page_size)
    decode = dataclasses.replace(attention, decode=True)
    rows = [
        _row("paged_attention (decode)", backend, paged.BACKENDS, decode, target),
        _row("paged_attention (mixed)", backend, paged.BACKENDS, attention, target),
        _row("packed_attention", backend, packed.BACKENDS, packed_spec, target),
        _rotation_row(RotationSpec(heads, kv_heads, head_dim, dtype), backend, target),
        _row("rope_write_kv", kv_write.writer(backend), kv_write.BACKENDS, write, target),
    ]
    if gated is not None:
        rows.append(_gated_row(gated, backend, target))
    if qkv is not None:
        rows.append(_qkv_row(qkv, backend, target))
    return rows


def describe_embedder_backends(
    attention: AttentionSpec,
    *,
    backend: str = "auto",
    rotation: RotationSpec | None = None,
    gated: GatedSpec | None = None,
    qkv: QKVSpec | None = None,
    stack: EncoderStackSpec | None = None,
    target: Target | None = None,
) -> list[tuple[str, str, str]]:
    """As `describe_backends`, for a model that computes whole texts and keeps no pages.

    Args:
      attention: of its `packed_attention`; rotation: of its `rope_qkv`; gated: of its `gated_product`; qkv: of its
        `qkv_product`; stack: what `encoder_stack` would have to serve. None: it has none.
    """
    target = target or current_target()
    rows = [_row("packed_attention", backend, packed.BACKENDS, attention, target)]
    if rotation is not None:
        rows.append(_rotation_row(rotation, backend, target))
    if gated is not None:
        rows.append(_gated_row(gated, backend, target))
    if qkv is not None:
        rows.append(_qkv_row(qkv, backend, target))
    if stack is not None and backend in ("auto", "mosaic") and target.compute_capability is not None:
        why = encoder_stack.mosaic_refusal(stack, target)
        op = f"encoder_stack (up to {encoder_stack.TOKENS} tokens)"
        rows.append((op, "none" if why else "mosaic", f"mosaic: {why}" if why else ""))
    return rows


def _row(op: str, backend: str, backends: Sequence[Backend], spec: Any, target: Target) -> tuple[str, str, str]:
    chosen, refusals = choose(backend, backends, spec, target)
    return op, chosen.name if chosen else "none", "; ".join(f"{name}: {why}" for name, why in refusals)


def _rotation_row(spec: RotationSpec, backend: str, target: Target) -> tuple[str, str, str]:
    return _row("rope_qkv", qkv_rotation.rotator(backend), qkv_rotation.BACKENDS, spec, target)


def _gated_row(spec: GatedSpec, backend: str, target: Target) -> tuple[str, str, str]:
    op, why = "gated_product", gated_mlp.mosaic_refusal(spec, target)
    if backend != "reference" and why is None:
        return f"{op} ({describe_tokens(spec.mlp, target)})", "mosaic", ""
    silent = backend == "reference" or target.compute_capability is None
    return op, "reference", "" if silent else f"mosaic: {why}"


def _qkv_row(spec: QKVSpec, backend: str, target: Target) -> tuple[str, str, str]:
    op = "qkv_product" if spec.kv_dtype is None else "qkv_product_paged"
    why, asked = qkv_projection.mosaic_refusal(spec, target), backend in ("auto", "mosaic")
    if asked and why is None:
        return f"{op} (from {LEAST_TOKENS} tokens, where its tiles are full enough)", "mosaic", ""
    return op, "reference", f"mosaic: {why}" if asked and target.compute_capability is not None else ""
