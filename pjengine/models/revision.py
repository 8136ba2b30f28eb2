"""Which weights a model has, as a short name: what tells two models apart that lie in folders of one name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from pjengine.models.safetensors_files import weight_files
from pjengine.models.sources import ORBAX_WEIGHTS, Source

_SETTINGS = (  # that decide results, beside the weights; a directory may hold others, here and not there
    *("config.json", "config_sentence_transformers.json", "modules.json", "sentence_bert_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
_MODULES = ("[0-9]*/config.json", "[0-9]*/*.safetensors")  # of sentence-transformers
_WHOLE = 1 << 20  # bytes up to which a file is read whole
_SAMPLES, _SAMPLE = 256, 4096  # of a longer file: how many pieces, spread evenly, of how many bytes


def revision(source: Source) -> str:
    """16 hexadecimal digits, equal where configuration, tokenizer and weights are, wherever they lie.

    Of large files the length and 256 pieces of 4 KiB are looked at, a few milliseconds each, not every byte: enough for
    weights that were trained on or quantised anew, not for a change that somebody wants to hide.
    """
    digest = hashlib.sha256()
    for name, path in sorted(_files(source)):
        size = path.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE:
                digest.update(file.read())
                continue
            for i in range(_SAMPLES):
                file.seek((size - _SAMPLE) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


def _files(source: Source) -> Iterator[tuple[str, Path]]:
    """The model's files by name; of one with random weights only what decides their shapes."""
    root = source.path
    if root.is_file():
        yield "", root
        return
    if source.kind == "dummy":
        found = [root / _SETTINGS[0]]
    else:
        modules = (path for pattern in _MODULES for path in root.glob(pattern))
        weights = (root / ORBAX_WEIGHTS).rglob("*") if source.kind == "orbax" else weight_files(root)
        found = [*(root / name for name in _SETTINGS), *modules, *weights]
    for path in found:
        if path.is_file():
            yield path.relative_to(root).as_posix(), path
