"""Tiny vocabularies: byte-level BPE as GGUF metadata, and as a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pjengine.models.gguf_format import GGUFHeader
from pjengine.models.gguf_tokenizer import tokenizer_config_of, tokenizer_of
from pjengine.tokenizer import Tokenizer

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_level_metadata(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    """GGUF metadata of a byte-level BPE: ids 0..255 are the bytes, then six merges, control and user-defined tokens."""
    tokens, merges = byte_alphabet(), ["h e", "l l", "he ll", "hell o", "Ġ Ġ", "Ġ hello"]
    tokens += [merge.replace(" ", "") for merge in merges]
    control, user_defined = ["<|start|>", "<|end|>", "<bos>"], ["<think>"]
    kinds = [1] * len(tokens) + [3] * len(control) + [4] * len(user_defined)
    tokens += control + user_defined
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<bos>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
        "tokenizer.chat_template": TEMPLATE,
        **{f"tokenizer.{key}": value for key, value in changes.items()},
    }


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """GGUF metadata of a SentencePiece BPE with byte fallback: the score decides which pair merges first."""
    pieces = {
        "▁": -9.0,
        "a": -10.0,
        "b": -11.0,
        "c": -12.0,
        "ab": -2.0,
        "bc": -1.0,
        "▁a": -3.0,
        "abc": -4.0,
        "▁▁": -5.0,
    }
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * (len(tokens) - len(pieces)) + list(pieces.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.{key}": value for key, value in changes.items()},
    }


def from_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    header = GGUFHeader(Path("tiny.gguf"), dict(metadata), {})
    return Tokenizer(tokenizer_of(header), tokenizer_config_of(header))


def write_tokenizer(folder: Path, **config: Any) -> Path:
    """tokenizer.json and tokenizer_config.json of the byte-level vocabulary."""
    header = GGUFHeader(Path("tiny.gguf"), byte_level_metadata(), {})
    tokenizer_of(header).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
