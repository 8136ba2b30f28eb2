"""A stage of a Ray Data pipeline: docs/distributed.md has one as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pjengine.bulk.vectors import vector_column
from pjengine.llm import LLM

if TYPE_CHECKING:
    import pyarrow


class Embedder:
    """For `Dataset.map_batches(Embedder, …, batch_format="pyarrow")`: an actor holds the model and embeds its batches.

    Adds the column `embedding`, a fixed-size list of float32, to each batch.

    Args:
      model: as `LLM` takes it.
      text_column: of the batches, strings.
      prompt_name, dimensions, truncate_prompt_tokens: as in `LLM.embed`.
      **options: fields of EngineConfig.
    Raises:
      InvalidRequest: a text is wrong, for one longer than the model's window without `truncate_prompt_tokens`.
    """

    def __init__(
        self,
        model: str,
        text_column: str = "text",
        *,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
        **options: Any,
    ):
        self._llm = LLM(model, **options)
        self._text_column = text_column
        self._how: dict[str, Any] = {
            "prompt_name": prompt_name,
            "dimensions": dimensions,
            "truncate_prompt_tokens": truncate_prompt_tokens,
        }

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        texts = batch.column(self._text_column).to_pylist()
        results = self._llm.embed(texts, use_tqdm=False, **self._how)
        vectors = np.stack([result.embedding for result in results])
        return batch.append_column("embedding", vector_column(vectors))
