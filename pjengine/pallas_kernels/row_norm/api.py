"""`rms_norm` and `layer_norm`: the public ops, and where a kernel serves; cheap to import, unlike that."""

from __future__ import annotations

import importlib

import jax

from pjengine.pallas_kernels.backends import Target, current_target
from pjengine.pallas_kernels.row_norm import reference
from pjengine.pallas_kernels.specs import RowNormSpec

# Of fewer rows norms cost little, and XLA fuses what comes before into them; of longer rows it is as fast.
LEAST_ROWS, MOST_HIDDEN = 2048, 1024
LANES, VECTOR = 32, 8  # a warp holds a row, in vectors of 16 bytes


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, *, backend: str = "reference") -> jax.Array:
    """Root-mean-square norm (arXiv:1910.07467) over the last axis, in float32; x's dtype out.

    Args:
      weight: of the last axis.
      backend: as in `paged_attention`: "auto" and "mosaic" take the kernel for the many rows for which it is faster.
    """
    if _serves(x, (weight,), backend):
        return _kernel(x, (weight,), eps, centred=False)
    return reference.rms_norm(x, weight, eps)


def layer_norm(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, eps: float, *, backend: str = "reference"
) -> jax.Array:
    """Layer norm (arXiv:1607.06450) over the last axis, in float32; x's dtype out.

    Args:
      weight, bias: of the last axis.
      backend: as in `rms_norm`.
    """
    affine = (weight,) if bias is None else (weight, bias)
    if _serves(x, affine, backend):
        return _kernel(x, affine, eps, centred=True)
    return reference.layer_norm(x, weight, bias, eps)


def mosaic_refusal(spec: RowNormSpec, target: Target) -> str | None:
    """Why the kernel cannot serve such rows, or None."""
    if target.compute_capability != 90:
        return f"needs compute capability 9.0, got {target.compute_capability}"
    if spec.dtype not in ("bfloat16", "float16"):
        return f"elements must be of 16 bits, got {spec.dtype}"
    if spec.hidden % (LANES * VECTOR) or spec.hidden > MOST_HIDDEN:
        return f"hidden must be a multiple of {LANES * VECTOR} up to {MOST_HIDDEN}, got {spec.hidden}"
    return None


def _serves(x: jax.Array, affine: tuple[jax.Array, ...], backend: str) -> bool:
    if backend not in ("auto", "mosaic") or x.ndim != 2 or x.shape[0] < LEAST_ROWS:
        return False
    alike = all(array.dtype == x.dtype for array in affine)
    return alike and mosaic_refusal(RowNormSpec(x.shape[1], x.dtype.name), current_target()) is None


def _kernel(x: jax.Array, affine: tuple[jax.Array, ...], eps: float, *, centred: bool) -> jax.Array:
    mosaic = importlib.import_module("pjengine.pallas_kernels.row_norm.mosaic")
    spec = RowNormSpec(x.shape[1], x.dtype.name, centred=centred, eps=eps)
    normalised: jax.Array = mosaic.normalise_rows(x, affine, spec=spec)
    return normalised
