"""Which paged attention calls each GPU backend serves; cheap to import, unlike the backends themselves."""

from __future__ import annotations

from pjengine.pallas_kernels import head_sizes
from pjengine.pallas_kernels.backends import Target
from pjengine.pallas_kernels.specs import AttentionSpec


def mosaic_refusal(spec: AttentionSpec, target: Target) -> str | None:
    """Why the Mosaic backend cannot serve such a call, or None."""
    if target.compute_capability != 90:
        return f"needs compute capability 9.0, got {target.compute_capability}"
    if spec.dtype not in ("bfloat16", "float16"):
        return f"the tensor cores take bfloat16 and float16, got {spec.dtype}"
    if spec.kv_dtype not in (spec.dtype, "float8_e4m3fn"):
        return f"the cache must have q's dtype or be float8_e4m3fn, got {spec.dtype} and {spec.kv_dtype}"
    if spec.head_dim not in (64, 80, 96, 128, 256):
        return f"head_dim must be 64, 80, 96, 128 or 256, got {spec.head_dim}"
    if spec.group > 16:
        return f"at most 16 query heads per KV head, got {spec.group}"
    if spec.page_size not in (16, 32, 64, 128):
        return f"page_size must be 16, 32, 64 or 128, got {spec.page_size}"
    return None


def fused_refusal(spec: AttentionSpec, target: Target, *, norm: bool) -> str | None:
    """Why the Mosaic backend cannot rotate, write and attend in one kernel in such a call, or None.

    Args:
      norm: heads of q and k are normalised before rotation.
    """
    if not spec.decode:
        return "only rows of one query each are rotated and written where they attend"
    if spec.kv_dtype != spec.dtype or spec.kv_scales:
        return f"the cache must hold elements as they are, got {spec.dtype} and {spec.kv_dtype}"
    return mosaic_refusal(spec, target) or head_sizes.refusal(spec.head_dim, spec.dtype, norm=norm)
