"""What callers need to know of an engine; importable without jax."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """What callers need to know of an engine.

    Attributes:
      kind: "generate" or "embed".
      embedding_size: elements of an embedding; 0 for "generate".
      backends: (op, backend, why) as printed at start-up.
    """

    model: str
    kind: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    embedding_size: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    page_size: int = 0
    backends: tuple[tuple[str, str, str], ...] = ()
