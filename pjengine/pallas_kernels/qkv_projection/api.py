"""`qkv_product`, `qkv_product_paged` and where they serve; cheap to import, unlike their kernel."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax

from pjengine.pallas_kernels.backends import Target, current_target
from pjengine.pallas_kernels.head_norms import head_norm_eps
from pjengine.pallas_kernels.kv_write.support import check_pages
from pjengine.pallas_kernels.persistent_product.tiles import COLUMNS, K_STEP, config_for
from pjengine.pallas_kernels.qkv_projection.tiles import pays
from pjengine.pallas_kernels.rope import check_angles
from pjengine.pallas_kernels.specs import QKVSpec

HEAD_DIMS = (64, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """A fused projection of q, k and v, and what happens to heads of q and k before they are rotated.

    Attributes:
      weight: [hidden, (heads + 2 * kv_heads) * head_dim]: the heads of q, then those of k, then those of v; bias: of
        these columns, or None.
      q_norm, k_norm: [head_dim], weights of an RMS norm of each head, or both None; eps: of the norm.
    """

    weight: jax.Array
    bias: jax.Array | None = None
    kv_heads: int
    head_dim: int
    q_norm: jax.Array | None = None
    k_norm: jax.Array | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Raises: ValueError, shapes that contradict each other."""
        width = self.weight.shape[1]
        if width % self.head_dim or width // self.head_dim <= 2 * self.kv_heads:
            raise ValueError(
                f"weight: {width} columns are no heads of {self.head_dim} beside those of {self.kv_heads} k and v"
            )
        if self.bias is not None and self.bias.shape != (width,):
            raise ValueError(f"bias: expected [{width}], got {self.bias.shape}")

    @property
    def arrays(self) -> list[jax.Array]:
        """All that there are."""
        return [a for a in (self.weight, self.bias, self.q_norm, self.k_norm) if a is not None]

    def spec(self, dtype: str, kv_dtype: str | None = None) -> QKVSpec:
        """dtype: of x; kv_dtype: of pages, if any."""
        (hidden, width), head_dim = self.weight.shape, self.head_dim
        eps = self.eps if self.q_norm is not None else None
        heads = width // head_dim - 2 * self.kv_heads
        return QKVSpec(hidden, heads, self.kv_heads, head_dim, dtype, kv_dtype, eps, self.bias is not None)


def mosaic_refusal(spec: QKVSpec, target: Target) -> str | None:
    """Why the kernel cannot serve such a projection, or None."""
    if target.compute_capability != 90:
        return f"needs compute capability 9.0, got {target.compute_capability}"
    if spec.dtype not in ("bfloat16", "float16"):
        return f"the tensor cores take bfloat16 and float16, got {spec.dtype}"
    if spec.head_dim not in HEAD_DIMS:
        return f"head_dim must be 64 or 128, got {spec.head_dim}"
    if spec.hidden % K_STEP or spec.width % COLUMNS:
        return (
            f"hidden and the projection's columns must be multiples of {K_STEP} and {COLUMNS}, got {spec.hidden} and "
            f"{spec.width}"
        )
    if spec.kv_dtype is None:
        return None
    if spec.kv_dtype != spec.dtype:
        return f"pages must be in the projection's dtype {spec.dtype}, got {spec.kv_dtype}"
    if any(heads * spec.head_dim % COLUMNS for heads in (spec.heads, spec.kv_heads)):
        return (
            f"columns of q and of k must be multiples of {COLUMNS} for pages, got {spec.heads} and {spec.kv_heads} "
            f"heads of {spec.head_dim}"
        )
    return None


def serves_qkv_product(
    x: jax.Array, projection: Projection, k_pages: jax.Array | None = None, *, backend: str = "auto"
) -> bool:
    """Whether `qkv_product`, or with pages `qkv_product_paged`, can take these and beats a product and a rotation.

    Args:
      backend: as in `paged_attention`; "reference": never; "triton": never, its kernels take q, k and v apart, which
        XLA rotates on the way.
    """
    tokens, target = x.shape[0], current_target()
    spec = projection.spec(x.dtype.name, None if k_pages is None else k_pages.dtype.name)
    same = all(array.dtype == x.dtype for array in projection.arrays)
    fits = tokens % 8 == 0 and same and mosaic_refusal(spec, target) is None
    return fits and backend in ("auto", "mosaic") and pays(tokens, spec.hidden, spec.width, target)


def qkv_product(x: jax.Array, projection: Projection, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`rope_qkv` of x's projection in one kernel; float32 up to its results. Only where `serves_qkv_product`.

    Args:
      x: [T, hidden], bfloat16 or float16; the projection's arrays: in x's dtype.
      cos, sin: float32 [T, head_dim // 2] as in `apply_rope`.
    Returns: [T, heads + 2 * kv_heads, head_dim] in x's dtype.
    Raises:
      ValueError: shapes that contradict each other.
    """
    product: jax.Array = _mosaic().qkv_product(
        *_operands(x, projection, cos, sin),
        spec=projection.spec(x.dtype.name),
        config=config_for(x.shape[0], current_target()),
    )
    return product


def qkv_product_paged(
    x: jax.Array,
    projection: Projection,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    write_slots: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`rope_write_kv_qkv` of x's projection in one kernel, as `qkv_product` is `rope_qkv`.

    Args:
      k_pages, v_pages, write_slots: as in `rope_write_kv`, the pages in x's dtype.
      The others: as in `qkv_product`.
    Returns: (q rotated [T, heads, head_dim], k_pages, v_pages).
    Raises: as `qkv_product`.
    """
    kv_heads, head_dim = projection.kv_heads, projection.head_dim
    check_pages(k_pages, v_pages, write_slots, tokens=x.shape[0], kv_heads=kv_heads, head_dim=head_dim)
    written: tuple[jax.Array, jax.Array, jax.Array] = _mosaic().qkv_product_paged(
        *_operands(x, projection, cos, sin),
        k_pages,
        v_pages,
        write_slots,
        spec=projection.spec(x.dtype.name, k_pages.dtype.name),
        config=config_for(x.shape[0], current_target()),
    )
    return written


def _mosaic() -> Any:
    return importlib.import_module("pjengine.pallas_kernels.qkv_projection.mosaic")


def _operands(x: jax.Array, projection: Projection, cos: jax.Array, sin: jax.Array) -> list[Any]:
    """What the kernels take first. Raises: ValueError, shapes that contradict each other."""
    (tokens, hidden), head_dim = x.shape, projection.head_dim
    if hidden != projection.weight.shape[0]:
        raise ValueError(f"x, weight: {x.shape} and {projection.weight.shape} do not fit")
    check_angles(cos, sin, tokens, head_dim)
    q_norm, k_norm = projection.q_norm, projection.k_norm
    head_norm_eps(q_norm, k_norm, projection.eps, jax.ShapeDtypeStruct((tokens, head_dim), x.dtype))
    norms = () if q_norm is None or k_norm is None else (q_norm, k_norm)
    return [x, projection.weight, (cos, sin), norms, () if projection.bias is None else (projection.bias,)]
