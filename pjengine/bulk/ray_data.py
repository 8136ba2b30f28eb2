"""A stage of a Ray Data pipeline: docs/distributed.md has one as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pjengine.bulk.vectors import vector_column
from pjengine.errors import InvalidRequest
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
      InvalidRequest: a text is wrong, for one longer than the model's window without `truncate_prompt_tokens`, or the
        batches are not what is said above.
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
        results = self._llm.embed(self._texts(batch), use_tqdm=False, **self._how)
        size = self._how["dimensions"] or self._llm.info.embedding_size
        vectors = np.array([result.embedding for result in results], np.float32).reshape(-1, size)
        return batch.append_column("embedding", vector_column(vectors))

    def _texts(self, batch: pyarrow.Table) -> list[str]:
        name, names = self._text_column, getattr(batch, "column_names", None)
        if names is None:
            raise InvalidRequest(f'batch_format: expected "pyarrow", got {type(batch)}', field="batch_format")
        if name not in names:
            raise InvalidRequest(f"text_column: {name!r} is none of {', '.join(names)}", field="text_column")
        if "embedding" in names:
            raise InvalidRequest("embedding: the batches have such a column already; drop or rename it first")
        texts = batch.column(name).to_pylist()
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise InvalidRequest(f"{name}: expected strings, got {text!r} in row {row} of a batch; filter first")
        return texts
