"""The part of a model that API processes need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

from pjengine.config import EngineConfig
from pjengine.models.sources import Source, resolve
from pjengine.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class TextSide:
    """A model's files and its tokenizer, None where it has none."""

    source: Source
    tokenizer: Tokenizer | None

    @classmethod
    def of(cls, source: Source) -> TextSide:
        return cls(source, load_tokenizer(source))


def load_text_side(config: EngineConfig) -> TextSide:
    """Of the model that the engine will load; fetches it if need be, so that the engine finds it."""
    return TextSide.of(resolve(config.model, config.load_format))


LoadText: TypeAlias = Callable[[EngineConfig], TextSide]
