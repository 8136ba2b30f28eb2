"""Which packed attention calls each GPU backend serves; cheap to import, unlike the backends themselves."""

from __future__ import annotations

from pjengine.pallas_kernels.backends import Target
from pjengine.pallas_kernels.specs import AttentionSpec

LONG = 480  # tokens: batches made for sequences of at least this mean length take the kernel for long ones
HEAD_DIMS = (32, 64, 128)  # others lower, and no GPU has checked them


def mosaic_refusal(spec: AttentionSpec, target: Target) -> str | None:
    """Why the Mosaic backend cannot serve such a call, or None."""
    if target.compute_capability != 90:
        return f"needs compute capability 9.0, got {target.compute_capability}"
    if spec.dtype not in ("bfloat16", "float16"):
        return f"the tensor cores take bfloat16 and float16, got {spec.dtype}"
    if spec.head_dim not in HEAD_DIMS:
        return f"head_dim must be 32, 64 or 128, got {spec.head_dim}"
    if spec.sinks:
        return "attention sinks are not implemented"
    if spec.relative_bias:
        return "relative biases are not implemented"
    return None
