"""What the code imports and what pyproject.toml asks for are the same."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# Imported by others: mosaic_gpu needs absl and does not ask for it, uvicorn takes httptools where it is.
INDIRECT = {"absl-py", "httptools"}
# Halves of one installation.
COMES_WITH = {"jaxlib": "jax", "pydantic-core": "pydantic"}
# Of features that say which extra they need when it is missing.
EXTRAS = ("bench", "bulk", "queue", "triton")
# Used where it is installed, missed where it is not.
OPTIONAL = {"uvloop"}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(r).name) for r in requirements}


def imported(*folders: str) -> set[str]:
    """Top-level modules that the files of these folders import, wherever in the file."""
    found = set()
    for folder in folders:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"pjengine", "tests", "scripts"}


def distributions(modules: set[str]) -> set[str]:
    """Distributions that these modules come in; a module that is not installed stands for itself."""
    known = importlib.metadata.packages_distributions()
    found = {canonicalize_name(name) for module in modules for name in known.get(module, [module])}
    return {COMES_WITH.get(name, name) for name in found}


def test_the_package_imports_exactly_what_it_asks_for() -> None:
    asked = names(project()["dependencies"]).union(*(names(project()["optional-dependencies"][e]) for e in EXTRAS))
    assert distributions(imported("pjengine")) - OPTIONAL | INDIRECT == asked


def test_the_tests_import_only_what_dev_brings() -> None:
    asked = names(project()["dependencies"]) | names(project()["optional-dependencies"]["dev"])
    assert distributions(imported("tests")) <= asked
