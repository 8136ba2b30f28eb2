"""`pjengine bench kernels` on a machine without a GPU, and the shapes it would time."""

from __future__ import annotations

from pathlib import Path

import typer.testing

from pjengine.bench import kernels
from pjengine.serving.cli import app


def test_a_cpu_only_machine_gets_a_clear_message(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    done = typer.testing.CliRunner().invoke(app, ["bench", "kernels", "--json", str(target)])
    assert done.exit_code == 1
    assert done.stderr.startswith("pjengine: error: bench kernels: needs an NVIDIA GPU")
    assert not target.exists()


def test_skewed_cases_have_the_stated_shape() -> None:
    lengths = kernels.decode_cases()["256, log-normal, mean 400"]
    assert len(lengths) == 256
    assert 300 < sum(lengths) / 256 < 500
    assert max(lengths) > 2000
    queries = kernels.packed_cases()["16k tokens of queries, mean 18"]
    assert 14000 < sum(queries) <= 16384
    assert 12 < sum(queries) / len(queries) < 24
