"""Which attention calls the Triton backend serves; cheap to import, unlike the backend itself."""

from __future__ import annotations

import importlib.util

from pjengine.pallas_kernels.backends import Target
from pjengine.pallas_kernels.specs import AttentionSpec

OLDEST, OLDEST_WITH_FLOAT8 = 80, 89


def triton_refusal(spec: AttentionSpec, target: Target) -> str | None:
    """Why the Triton backend cannot serve such a call, or None."""
    capability = target.compute_capability
    if capability is None or capability < OLDEST:
        return f"needs compute capability 8.0 or later, got {capability}"
    missing = [name for name in ("jax_triton", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install 'pjengine[triton]'"
    if spec.dtype not in ("bfloat16", "float16", "float32"):
        return f"takes bfloat16, float16 and float32, got {spec.dtype}"
    if spec.kv_dtype == "float8_e4m3fn":
        if capability < OLDEST_WITH_FLOAT8:
            return f"float8_e4m3fn needs compute capability 8.9 or later, got {capability}"
    elif spec.kv_dtype != spec.dtype:
        return f"the cache must have q's dtype or be float8_e4m3fn, got {spec.dtype} and {spec.kv_dtype}"
    if spec.head_dim > 256:
        return f"head_dim must be at most 256, got {spec.head_dim}"
    if spec.group > 16:
        return f"at most 16 query heads per KV head, got {spec.group}"
    return None
