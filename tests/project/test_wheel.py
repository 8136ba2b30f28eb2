"""The wheel holds the package and nothing else."""

from __future__ import annotations

import configparser
import email
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, because setuptools writes beside the sources; links copied as links, as git would."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("pjengine", "tests", "scripts"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("models", "pallas_kernels", "serving", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    # What must come along and what must not, whether or not the tree has such files today.
    (source / "pjengine/pallas_kernels/paged/planted.json").write_text("{}")
    (source / "pjengine/models/planted.safetensors").touch()
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile, source: Path) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {str(p.relative_to(source)) for p in (source / "pjengine").rglob("*.py")}
    scripts = {str(p.relative_to(source)) for p in (source / "pjengine" / "queue").rglob("*.lua")}
    tables = {str(p.relative_to(source)) for p in (source / "pjengine" / "pallas_kernels").rglob("*.json")}
    assert "pjengine/serving/cli.py" in modules
    assert "pjengine/pallas_kernels/paged/planted.json" in tables
    assert "pjengine/queue/claim.lua" in scripts
    assert held == modules | tables | scripts | {"pjengine/py.typed"}


def test_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_bytes(read(wheel, "METADATA"))
    assert metadata["Name"] == "pjengine"
    assert metadata["Version"] == "0.1.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(extras)
    assert b"Apache License" in read(wheel, "licenses/LICENSE")


def test_torch_comes_only_with_the_golden_extra(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_bytes(read(wheel, "METADATA"))
    for requirement in metadata.get_all("Requires-Dist", []):
        if requirement.startswith(("torch", "sentence-transformers", "accelerate")):
            assert requirement.endswith('extra == "golden"'), requirement


def test_entry_point(wheel: zipfile.ZipFile) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(read(wheel, "entry_points.txt").decode())
    assert dict(parser["console_scripts"]) == {"pjengine": "pjengine.serving.cli:app"}


def read(wheel: zipfile.ZipFile, suffix: str) -> bytes:
    (name,) = (n for n in wheel.namelist() if n.endswith(f".dist-info/{suffix}"))
    return wheel.read(name)
