"""Which rotations the Mosaic backend serves; cheap to import, unlike the backend itself."""

from __future__ import annotations

from pjengine.pallas_kernels import head_sizes
from pjengine.pallas_kernels.backends import Target
from pjengine.pallas_kernels.packed.support import HEAD_DIMS
from pjengine.pallas_kernels.specs import RotationSpec


def mosaic_refusal(spec: RotationSpec, target: Target) -> str | None:
    """Why the Mosaic backend cannot serve such a call, or None."""
    if target.compute_capability != 90:
        return f"needs compute capability 9.0, got {target.compute_capability}"
    if spec.head_dim not in HEAD_DIMS:
        return f"no kernel reads a projection with heads of {spec.head_dim} where it lies"
    return head_sizes.refusal(spec.head_dim, spec.dtype, norm=spec.norm_eps is not None)
