"""What turns a classifier's logits into the scores its users see; on the host, importable without jax."""

from __future__ import annotations

import numpy as np

ACTIVATIONS = ("sigmoid", "softmax", "identity")


def activate(logits: np.ndarray, activation: str) -> np.ndarray:
    """Scores float32 [..., labels] of logits [..., labels].

    Args:
      activation: "sigmoid" (each label for itself), "softmax" (over the labels) or "identity" (the logits).
    Raises: ValueError for another activation.
    """
    x = np.asarray(logits, np.float32)
    match activation:
        case "sigmoid":
            return 0.5 * (np.tanh(0.5 * x) + 1)  # 1 / (1 + exp(-x)), which would overflow
        case "softmax":
            weights = np.exp(x - x.max(-1, keepdims=True))
            return weights / weights.sum(-1, keepdims=True)
        case "identity":
            return x
        case _:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
