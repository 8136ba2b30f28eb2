"""`gated_product` and where it serves; cheap to import, unlike its kernel."""

from __future__ import annotations

import importlib

import jax

from pjengine.pallas_kernels.backends import Target, current_target
from pjengine.pallas_kernels.gated_mlp.tiles import pays
from pjengine.pallas_kernels.persistent_product.tiles import config_for
from pjengine.pallas_kernels.specs import GatedSpec


def mosaic_refusal(spec: GatedSpec, target: Target) -> str | None:
    """Why the kernel cannot serve such an MLP, or None."""
    if target.compute_capability != 90:
        return f"needs compute capability 9.0, got {target.compute_capability}"
    if spec.dtype not in ("bfloat16", "float16"):
        return f"the tensor cores take bfloat16 and float16, got {spec.dtype}"
    if spec.hidden % 64 or spec.mlp % 128:
        return f"hidden and mlp must be multiples of 64 and 128, got {spec.hidden} and {spec.mlp}"
    return None


def serves_gated_product(x: jax.Array, weight: jax.Array, backend: str = "auto") -> bool:
    """Whether `gated_product` can take x and weight and is faster than a product and its activation.

    Args:
      backend: as in `paged_attention`; only "reference" has a say: never.
    """
    tokens, hidden = x.shape
    spec, target = GatedSpec(hidden, weight.shape[1] // 2, x.dtype.name), current_target()
    fits = tokens % 8 == 0 and weight.dtype == x.dtype and mosaic_refusal(spec, target) is None
    return fits and backend != "reference" and pays(tokens, spec.mlp, target)


def gated_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """silu(x @ gate) * (x @ up) in one kernel; sums and activation are float32. Only where `serves_gated_product`.

    Args:
      x: [T, hidden], bfloat16 or float16; weight: [hidden, 2 * mlp] in x's dtype, gate and up side by side.
    Returns: [T, mlp] in x's dtype.
    """
    mosaic = importlib.import_module("pjengine.pallas_kernels.gated_mlp.mosaic")
    product: jax.Array = mosaic.gated_product(x, weight, config=config_for(x.shape[0], current_target()))
    return product
