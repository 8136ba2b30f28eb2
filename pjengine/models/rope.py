"""Rotary position embedding: frequencies from a model's config, angles of a step's positions."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.errors import ModelError
from pjengine.models.hf_config import HFConfig, allow, required


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.

    Attributes:
      factor: stretch of the wavelengths above original_max_position_embeddings / low_freq_factor.
      low_freq_factor, high_freq_factor: bounds of the band between, in turns per original context.
      original_max_position_embeddings: context of the training before the stretch, tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        turns = self.original_max_position_embeddings * frequencies / np.float32(2 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = np.clip(keep, 0, 1).astype(np.float32)
        return keep * frequencies + (1 - keep) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv:2306.15595): every wavelength is stretched by `factor`."""

    factor: float

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        return frequencies / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding (arXiv:2104.09864) of heads of `head_dim` elements with base `theta`."""

    head_dim: int
    theta: float = 10000.0
    scaling: Llama3Scaling | LinearScaling | None = None

    @classmethod
    def from_hf(cls, hf: HFConfig, head_dim: int) -> Rope:
        """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
        allow(hf, "partial_rotary_factor", None, 1.0)
        field = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
        rope: HFConfig = hf.get(field) or {}
        allow(rope, "partial_rotary_factor", None, 1.0)
        if any(isinstance(value, dict) for value in rope.values()):
            raise ModelError(f"{field}: one set for all layers is supported, got one per layer type: {sorted(rope)}")
        theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
        match rope.get("rope_type") or rope.get("type") or "default":
            case "default":
                return cls(head_dim, theta)
            case "linear":
                return cls(head_dim, theta, LinearScaling(float(required(rope, "factor"))))
            case "llama3":
                original = rope.get("original_max_position_embeddings") or required(hf, "max_position_embeddings")
                scaling = Llama3Scaling(
                    factor=float(required(rope, "factor")),
                    low_freq_factor=float(required(rope, "low_freq_factor")),
                    high_freq_factor=float(required(rope, "high_freq_factor")),
                    original_max_position_embeddings=int(original),
                )
                return cls(head_dim, theta, scaling)
            case kind:
                raise ModelError(f"{field}: rope_type {kind!r} is not supported; default, linear and llama3 are")

    def frequencies(self) -> np.ndarray:
        """float32 [head_dim // 2]: radians per position of each pair of elements."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        frequencies = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        return self.scaling(frequencies) if self.scaling else frequencies

    def cos_sin(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine of each token's angles, float32 [T, head_dim // 2] both, of positions int32 [T]."""
        angles = positions.astype(jnp.float32)[:, None] * self.frequencies()
        return jnp.cos(angles), jnp.sin(angles)


def layer_ropes(
    hf: HFConfig, head_dim: int, global_theta: tuple[str, float], local_theta: tuple[str, float]
) -> tuple[Rope, Rope]:
    """Rotation of global layers and of those with a window.

    `rope_parameters` has a set for each (transformers 5), or each has a field for its base (before).

    Args:
      global_theta, local_theta: the field of each base, and its value where config.json is silent. A local one that is
        null is the global one.
    """
    parameters = hf.get("rope_parameters")
    (global_field, global_default), (local_field, local_default) = global_theta, local_theta
    if parameters is None:
        theta = float(hf.get(global_field) or global_default)
        local = float(hf.get(local_field, local_default) or theta)
        return Rope.from_hf({**hf, "rope_theta": theta}, head_dim), Rope(head_dim, local)
    kinds = {"full_attention": global_default, "sliding_attention": local_default}
    if not parameters.keys() <= kinds.keys():
        raise ModelError(f"rope_parameters: expected a set for each of {', '.join(kinds)}, got {sorted(parameters)}")
    global_rope, local_rope = (
        Rope.from_hf({**hf, "rope_parameters": {"rope_theta": theta, **(parameters.get(kind) or {})}}, head_dim)
        for kind, theta in kinds.items()
    )
    return global_rope, local_rope
