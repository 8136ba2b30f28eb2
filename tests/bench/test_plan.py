"""`pjengine plan`, against figures worked out by hand and against weights as they are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
import typer.testing

from pjengine import LLM
from pjengine.config import EngineConfig
from pjengine.device_plan import DEVICES, DevicePlan, plan_device
from pjengine.errors import ConfigError, OutOfMemory
from pjengine.memory_plan import GIB, OUTSIDE
from pjengine.models.loading import load
from pjengine.serving.cli import app

ROOT = Path(__file__).parents[2]
LLAMA_8B = str(ROOT / "benchmarks" / "llama-3.1-8b")


def plan(model: str = LLAMA_8B, memory: float = DEVICES["h200"], devices: int = 1, **options: Any) -> DevicePlan:
    return plan_device(EngineConfig(model=model, **options), memory, devices)


def test_llama_8b_on_one_card() -> None:
    found = plan()
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    assert found.memory.weights == 2 * (2 * 128256 * 4096 + 32 * layer + 4096) == 16_060_522_496
    assert found.kv_bytes_per_token == 2 * 8 * 128 * 2 * 32 == 131_072
    assert found.memory.tables == 513 * (128256 * 2 + 4 * 16 + 4 * 2048)
    assert found.memory.budget == int(139.8 * GIB) - OUTSIDE
    taken = found.memory.weights + found.memory.temporaries + found.memory.tables
    (pages,) = found.memory.pages
    assert pages == (found.memory.budget - taken) // (64 * 131_072)
    assert found.memory.cache == pages * 64 * 131_072 > 111 * GIB
    assert found.kv_tokens == (pages - 1) * 64
    assert found.longest == 131_072
    assert found.concurrent == {n: (pages - 1) // (n // 64) for n in (512, 2048, 8192, 32768, 131_072)}


def test_temporaries_grow_with_the_step() -> None:
    small, large = plan(max_num_batched_tokens=2048), plan(max_num_batched_tokens=16384)
    assert GIB / 2 < small.memory.temporaries < large.memory.temporaries < 10 * GIB


@pytest.mark.parametrize(("devices", "kv_heads"), [(8, 1), (16, 1), (2, 4)])
def test_tensor_parallel(devices: int, kv_heads: int) -> None:
    found = plan(devices=devices)
    heads = 32 // devices
    layer = 4096 * (heads + 2 * kv_heads) * 128 + heads * 128 * 4096 + 3 * 4096 * 14336 // devices + 2 * 4096
    assert found.memory.weights == 2 * (2 * 128256 // devices * 4096 + 32 * layer + 4096)
    assert found.kv_bytes_per_token == 2 * kv_heads * 128 * 2 * 32


def test_float32_doubles() -> None:
    half, full = plan(), plan(dtype="float32")
    assert full.memory.weights == 2 * half.memory.weights
    assert full.kv_bytes_per_token == 2 * half.kv_bytes_per_token


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "bert"])
def test_weights_are_those_that_load(name: str) -> None:
    model = str(ROOT / "tests" / "golden" / name)
    _, params, _ = load(model, dtype="bfloat16")
    assert plan(model, 24, dtype="bfloat16").memory.weights == sum(x.nbytes for x in jax.tree.leaves(params))


def test_a_window_bounds_what_a_sequence_holds(tmp_path: Path) -> None:
    config = json.loads((Path(LLAMA_8B) / "config.json").read_text())
    config |= {"model_type": "mistral", "sliding_window": 4096, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    windowed, full = plan(str(tmp_path)).concurrent, plan().concurrent
    assert windowed[2048] == full[2048]
    assert windowed[131_072] == windowed[8192] > 20 * full[131_072]


def test_encoder() -> None:
    found = plan(str(ROOT / "benchmarks" / "bge-large"), DEVICES["l4"])
    assert found.limits is None
    assert found.memory.weights == pytest.approx(2 * 334e6, rel=0.01)  # 335 M parameters, the pooler's 1 M not read
    assert found.longest == 512


def test_the_longest_text_is_that_of_the_engine(tmp_path: Path) -> None:
    """sentence-transformers' max_seq_length holds unless --max-model-len asks for more."""
    model = str(shutil.copytree(ROOT / "tests" / "golden" / "sentence-transformer", tmp_path / "model"))
    Path(model, "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    with LLM(model, max_num_batched_tokens=32) as llm:
        assert plan(model).longest == llm.info.max_model_len == 20
    assert plan(model, max_model_len=30).longest == 30


def test_what_does_not_fit() -> None:
    with pytest.raises(OutOfMemory, match=r"131072 tokens needs 16\.0\d\d GiB of KV cache.*weights 14\.96 GiB"):
        plan(memory=DEVICES["l4"], max_model_len=131_072)
    with pytest.raises(OutOfMemory, match=r"0\.000 GiB are left.*weights 14\.96 GiB"):
        plan(memory=16)
    with pytest.raises(OutOfMemory, match="num_pages: 20000 pages do not fit"):
        plan(num_pages=20000)
    with pytest.raises(OutOfMemory, match=r"model: it does not fit.*weights 0\.62 GiB"):
        plan(str(ROOT / "benchmarks" / "bge-large"), 1)


def test_a_sequence_as_long_as_fits() -> None:
    """Without --max-model-len the engine lowers the window to what its pages hold."""
    found = plan(memory=DEVICES["l4"])
    assert found.longest == found.kv_tokens < 131_072
    assert found.concurrent[found.longest] == 1


@pytest.mark.parametrize(
    ("devices", "memory", "said"),
    [(3, 80.0, "3 does not divide the model's num_heads, 32"), (1, 0.0, "device_memory"), (1, float("inf"), "GiB")],
)
def test_wrong_arguments(devices: int, memory: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(memory=memory, devices=devices)


def run(*arguments: str) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "120"})


def test_table(tmp_path: Path) -> None:
    """A directory with a config.json alone is enough."""
    file = tmp_path / "plan.json"
    done = run(LLAMA_8B, "--device", "H100", "--tensor-parallel", "4", "--max-model-len", "8192", "--json", str(file))
    assert done.exit_code == 0, done.output
    for said in (
        "each of 4 × H100",
        "32.0 KiB",
        "sequences of 8,192 tokens at once",
        "the engine's estimate",
        "not run tensor",
    ):
        assert said in done.stdout
    kept = json.loads(file.read_text())
    assert (kept["device"], kept["kv_bytes_per_token"], kept["longest"]) == ("H100", 32768, 8192)
    assert f"{kept['kv_tokens']:,} tokens" in done.stdout


def test_encoder_table() -> None:
    done = run(str(ROOT / "benchmarks" / "bge-large"), "--device-memory", "24")
    assert done.exit_code == 0
    assert "longest text" in done.stdout
    assert "KV" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/no/such/model"], "/no/such/model"),
        ([LLAMA_8B, "--device", "h2000"], "device: expected one of b200, h200"),
        ([LLAMA_8B, "--device", "a10g", "--dtype", "float32"], "KV cache, 0.000 GiB are left"),
        ([LLAMA_8B, "--max-model-len", "131073"], "max_model_len: expected at most 131072"),
        ([LLAMA_8B, "--json", "/no/such/folder/x"], "json: /no/such/folder/x cannot be written"),
    ],
)
def test_errors_are_one_line(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("pjengine: error: ")
    assert said in line
