"""Which weights a model has, as a short name: what tells two models apart that lie in folders of one name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from pjengine.models.sources import ORBAX_WEIGHTS, Source

_FILES = frozenset({".json", ".safetensors", ".gguf", ".model", ".txt", ".jinja"})
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
        yield "config.json", root / "config.json"
        return
    for path in root.rglob("*"):
        name = path.relative_to(root)
        if (path.suffix in _FILES or name.parts[0] == ORBAX_WEIGHTS) and path.is_file():
            yield name.as_posix(), path
