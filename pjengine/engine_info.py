"""What callers need to know of an engine; importable without jax."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """What callers need to know of an engine.

    Attributes:
      kind: "generate", "embed" or "classify" (which also scores pairs of texts).
      embedding_size: elements of an embedding; 0 for the other kinds.
      labels: of "classify": names of the classes in the order of the logits; of a reranker one, its score.
      activation: of "classify": one of `pjengine.activations.ACTIVATIONS`, which makes scores of the logits.
      max_num_seqs: of "generate": most sequences in a step.
      token_types: how many values `Request.token_type_ids` may take; 0: the engine takes none.
      backends: (op, backend, why) as printed at start-up.
      revision: of an embedder's or classifier's files (`pjengine.models.revision`); "": not looked at.
    """

    model: str
    kind: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    embedding_size: int = 0
    labels: tuple[str, ...] = ()
    activation: str = ""
    token_types: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    page_size: int = 0
    max_num_seqs: int = 0
    backends: tuple[tuple[str, str, str], ...] = ()
    revision: str = ""
