"""Kernel configs come from the device's table where it has the shape, else from the heuristic."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pjengine.bench import kernels, tuning
from pjengine.bench.tuning import Tunable, tune
from pjengine.errors import ConfigError
from pjengine.pallas_kernels.backends import Target
from pjengine.pallas_kernels.specs import AttentionSpec
from pjengine.pallas_kernels.tuning import read_rows, shape_key, tuned
from tests.kernels.hopper import lower_for_hopper

H200 = Target("gpu", 90, 132, "NVIDIA H200")
SPEC = AttentionSpec(heads=32, kv_heads=8, head_dim=128, page_size=64)


@dataclasses.dataclass(frozen=True)
class Config:
    block: int = 64
    stages: int = 2
    sms: int = 132


def write_table(folder: Path, config: dict[str, int]) -> None:
    rows = [{"kernel": "decode", "shape": shape_key(SPEC), "config": config}]
    (folder / "nvidia_h200.json").write_text(json.dumps({"rows": rows}))


def test_the_table_replaces_what_it_names(tmp_path: Path) -> None:
    write_table(tmp_path, {"stages": 5})
    assert tuned("decode", SPEC, H200, Config(sms=7), tmp_path) == Config(stages=5, sms=7)
    assert tuned("prefill", SPEC, H200, Config(), tmp_path) == Config()
    assert tuned("decode", dataclasses.replace(SPEC, page_size=16), H200, Config(), tmp_path) == Config()
    assert tuned("decode", SPEC, Target("gpu", 90, 132, "NVIDIA H100 PCIe"), Config(), tmp_path) == Config()
    assert tuned("decode", SPEC, Target("cpu"), Config(), tmp_path) == Config()


def test_a_table_of_another_version_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path, {"splits": 5})
    with pytest.raises(ValueError, match=r"decode: unknown fields \['splits'\]; run scripts/tune_kernels again"):
        tuned("decode", SPEC, H200, Config(), tmp_path)


def timed(config: Config) -> Callable[[], float]:
    if config.block == 256:
        raise ValueError("too much shared memory\nat 0x0")
    return lambda: {(64, 2): 10e-6, (64, 3): 9.9e-6, (128, 2): 8e-6, (128, 3): 7e-6}[config.block, config.stages]


def test_tuning_keeps_the_fastest_that_compiles() -> None:
    said: list[str] = []
    fields = {"block": (64, 128, 256), "stages": (2, 3)}
    row = tune(Tunable("decode", SPEC, Config(), fields, timed), said.append)
    assert row == {
        "kernel": "decode",
        "shape": "128x4 page 64 bfloat16 bfloat16",
        "config": {"block": 128, "stages": 3},
        "microseconds": 7.0,
        "heuristic_microseconds": 10.0,
    }
    assert sum("refused: too much shared memory" in line for line in said) == 2


def test_a_gain_below_the_margin_leaves_the_heuristic() -> None:
    row = tune(Tunable("decode", SPEC, Config(), {"stages": (2, 3)}, timed), lambda line: None)
    assert row["config"] == {}


def test_a_run_keeps_the_rows_of_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "current_target", lambda: H200)
    tunables = [Tunable(name, SPEC, Config(), {"block": (64, 128)}, timed) for name in ("decode", "prefill")]
    tuning.write_table(tunables, lambda line: None, tmp_path)
    path = tuning.write_table(tunables[:1], lambda line: None, tmp_path)
    assert [row["kernel"] for row in read_rows(path)] == ["decode", "prefill"]
    assert tuned("prefill", SPEC, H200, Config(), tmp_path) == Config(block=128)


def test_a_kernel_that_is_not_there_is_named() -> None:
    tunables = [Tunable(name, SPEC, Config(), {"block": (64, 128)}, timed) for name in ("decode", "prefill")]
    assert tuning.chosen(tunables, []) == tunables
    assert tuning.chosen(tunables, ["prefill"]) == tunables[1:]
    with pytest.raises(ConfigError, match=r"no kernel here is called decod; there are decode, prefill"):
        tuning.chosen(tunables, ["decod", "prefill"])


def test_without_a_gpu_it_says_so() -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pjengine.bench.tuning"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr.strip()) == (1, "tune_kernels: needs an NVIDIA GPU")


def test_the_packed_kernels_that_are_tuned_lower_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their heuristics, over small batches; the paged kernels are lowered in test_mosaic_lowering."""
    monkeypatch.setattr(kernels, "_random", lambda seed, *shape: jnp.zeros(shape, jnp.bfloat16))
    monkeypatch.setattr(kernels, "CALLS", 1)
    monkeypatch.setattr(tuning, "LONG_LENS", [200])
    monkeypatch.setattr(tuning, "SHORT_LENS", [18] * 3)
    texts: list[str] = []

    def lowered(function: Any, *arguments: Any) -> Callable[[], float]:
        texts.append(lower_for_hopper(function, *((x.shape, x.dtype) for x in arguments)))
        return lambda: 0.0

    monkeypatch.setattr(kernels, "_timer", lambda f, *arguments: lowered(f, *jax.tree.leaves(arguments)))
    found = [tunable for tunable in tuning.mosaic_tunables(Target("gpu", 90, 132)) if "packed" in tunable.kernel]
    for tunable in found:
        tunable.prepare(tunable.heuristic)
    assert len(texts) == len(found) == 4
    assert all("@mosaic_gpu_v2" in text for text in texts)
