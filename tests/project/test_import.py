"""`import pjengine` is quick, imports no JAX, and every public name is there."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import pjengine


def in_fresh_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_quick_and_imports_no_jax() -> None:
    code = """
import sys, time
start = time.process_time()
import pjengine
spent = time.process_time() - start
heavy = sorted({"jax", "numpy", "transformers", "pydantic", "starlette"} & set(sys.modules))
print(spent, heavy)
"""
    seconds, heavy = in_fresh_python(code).split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 0.3


@pytest.mark.parametrize("name", ["SamplingParams", "EngineConfig", "InvalidRequest"])
def test_options_and_errors_need_no_jax(name: str) -> None:
    assert in_fresh_python(f"import sys, pjengine; pjengine.{name}; print('jax' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("name", pjengine.__all__)
def test_public_names_exist_under_their_own_name(name: str) -> None:
    value = getattr(pjengine, name)
    if name != "__version__":
        assert value.__name__ == name
        assert getattr(importlib.import_module(value.__module__), name) is value


def test_dir_lists_the_public_names() -> None:
    assert set(pjengine.__all__) <= set(dir(pjengine))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = pjengine.LMM
