"""`encoder_stack`: where its kernel serves, and the op; cheap to import, unlike the kernel."""

from __future__ import annotations

import importlib

import jax

from pjengine.errors import KernelUnavailable
from pjengine.pallas_kernels.backends import Target, current_target
from pjengine.pallas_kernels.encoder_stack.packing import COLUMNS, PackedLayers
from pjengine.pallas_kernels.specs import EncoderStackSpec

TOKENS = 16  # of a batch: the rows of a tile of the products
SIZES = ((384, 12), (512, 8), (768, 12), (1024, 16))  # hidden and heads: those that have been compared on a GPU


def encoder_stack(x: jax.Array, query_starts: jax.Array, packed: PackedLayers, *, eps: float) -> jax.Array:
    """All layers of a post-norm encoder (arXiv:1810.04805): attention, a sum and a norm, GELU's MLP, a sum and a norm.

    Results are the same each time, and not bit by bit those of a layer at a time: sums meet in float32 for longer.

    Args:
      x: bfloat16 [16, hidden], the normalised embeddings of whole texts, one after the other, and padding.
      query_starts: int32 [texts + 1], first token of each text and the end of the last.
      packed: by `pack_layers`; a launch writes its counter and leaves it as it was, so one at a time may run.
      eps: of the norms.
    Returns: bfloat16 [16, hidden]; padding's rows are finite.
    Raises:
      ValueError: x or query_starts has another shape or dtype.
      KernelUnavailable: such layers, or this device, are not served (`serves_encoder_stack`).
    """
    hidden = packed.norms.shape[-1]
    if x.shape != (TOKENS, hidden) or x.dtype != packed.weights.dtype:
        expected = f"{packed.weights.dtype} [{TOKENS}, {hidden}]"
        raise ValueError(f"x: expected {expected}, got {x.dtype} {list(x.shape)}")
    if query_starts.ndim != 1 or query_starts.dtype != "int32":
        raise ValueError(
            f"query_starts: expected int32 [texts + 1], got {query_starts.dtype} {list(query_starts.shape)}"
        )
    if why := mosaic_refusal(EncoderStackSpec(hidden, packed.heads, 4 * hidden, x.dtype.name), current_target()):
        raise KernelUnavailable(f"encoder_stack: {why}")
    mosaic = importlib.import_module("pjengine.pallas_kernels.encoder_stack.mosaic")
    out: jax.Array = mosaic.encoder_layers(x, query_starts, packed, eps=eps)
    return out


def serves_encoder_stack(spec: EncoderStackSpec, backend: str) -> bool:
    """Whether the kernel serves such an encoder here; there is no other implementation. backend: as in `layer_norm`."""
    return backend in ("auto", "mosaic") and mosaic_refusal(spec, current_target()) is None


def mosaic_refusal(spec: EncoderStackSpec, target: Target) -> str | None:
    """Why the kernel cannot serve such an encoder, or None."""
    if target.compute_capability != 90:
        return f"needs compute capability 9.0, got {target.compute_capability}"
    if spec.dtype != "bfloat16":
        return f"elements must be bfloat16, got {spec.dtype}"
    if spec.hidden // spec.heads not in (32, 64):
        return f"head_dim must be 32 or 64, got {spec.hidden // spec.heads}"
    if spec.heads not in (8, 12, 16):
        return f"heads, each a warp, must be 8, 12 or 16, got {spec.heads}"
    if spec.mlp != 4 * spec.hidden:
        return f"the MLP must be four times as wide as hidden, got {spec.mlp} for {spec.hidden}"
    if (spec.hidden, spec.heads) not in SIZES:
        known = ", ".join(f"{hidden} and {heads}" for hidden, heads in SIZES)
        return f"hidden and heads must be {known}: others have not run on a GPU, got {spec.hidden} and {spec.heads}"
    blocks = spec.hidden // COLUMNS
    if target.cores is None or blocks > target.cores:
        return f"needs {blocks} streaming multiprocessors at once, got {target.cores}"
    return None
