"""An LLM over the simulated device of tests/core, whose next token is a hash of all that a sequence sees."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import pjengine.llm
from pjengine import LLM
from pjengine.config import EngineConfig
from pjengine.engine import Engine
from tests.core import simulated
from tests.helpers import GOLDEN

# One token per character, and the end of sequence: the simulated vocabulary.
LETTERS = dict(
    zip(["<eos>", *string.ascii_lowercase, "Ġ", *string.ascii_uppercase], range(simulated.VOCAB), strict=False)
)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}go{% endif %}"
)

MakeLLM = Callable[..., LLM]


def write_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab=LETTERS, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def make_llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeLLM:
    """Makes an LLM on the simulated device."""

    def make(tokenizer: bool = True, generation_config: dict[str, Any] | None = None, **options: Any) -> LLM:
        (tmp_path / "config.json").write_bytes((GOLDEN / "llama" / "config.json").read_bytes())
        if tokenizer:
            write_tokenizer(tmp_path)
        if generation_config is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))

        def make_engine(config: EngineConfig) -> Engine:
            engine = simulated.make_engine([None], pages=64, page_size=4, slots=4, budget=32)
            engine.max_waiting = config.max_waiting
            return engine

        monkeypatch.setattr(pjengine.llm, "make_engine", make_engine)
        return LLM(str(tmp_path), load_format="dummy", **options)

    return make


@pytest.fixture
def llm(make_llm: MakeLLM) -> LLM:
    return make_llm()
