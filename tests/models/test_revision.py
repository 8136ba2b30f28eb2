"""The digest that tells models apart whose folders have one name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pjengine.models.revision import revision
from pjengine.models.sources import resolve

BERT = Path(__file__).parents[1] / "golden" / "bert"


def of(folder: Path, load_format: str = "auto") -> str:
    return revision(resolve(str(folder), load_format))


def flip(path: Path, offset: int, count: int = 1) -> None:
    data = bytearray(path.read_bytes())
    for i in range(offset, offset + count):
        data[i] ^= 1
    path.write_bytes(data)


def test_equal_where_the_files_are_and_another_where_one_byte_differs(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(BERT, copy)
    assert of(copy) == of(BERT)
    for name in ("README.md", "trainer_state.json"):
        (copy / name).write_text("{}")
    assert of(copy) == of(BERT)
    weights = copy / "model.safetensors"
    flip(weights, weights.stat().st_size - 1)
    assert of(copy) != of(BERT)
    assert of(copy, "dummy") == of(BERT, "dummy"), "weights that are not read"
    (copy / "config.json").write_text((BERT / "config.json").read_text() + " ")
    assert of(copy, "dummy") != of(BERT, "dummy")


@pytest.mark.parametrize("file", ["tokenizer.json", "modules.json", "2_Dense/config.json", "2_Dense/model.safetensors"])
def test_what_else_decides_results(file: str, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(BERT.parent / "sentence-transformer", copy)
    before = of(copy)
    with (copy / file).open("a") as changed:
        changed.write(" ")
    assert of(copy) != before


def test_large_files_are_sampled(tmp_path: Path) -> None:
    shutil.copy(BERT / "config.json", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(np.random.default_rng(0).bytes(8 << 20))
    found = [of(tmp_path)]
    for offset in (0, 5 << 20, (8 << 20) - (64 << 10)):
        flip(weights, offset, count=64 << 10)  # a small layer's
        found.append(of(tmp_path))
    assert len(set(found)) == len(found)
