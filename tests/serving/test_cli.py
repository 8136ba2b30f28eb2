"""The `pjengine` command."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.testing

import pjengine
from pjengine.config import EngineConfig
from pjengine.queue.options import QueueOptions
from pjengine.serving.cli import app
from pjengine.serving.cli_options import attribute_docs
from pjengine.serving.server_options import ServerOptions
from tests.helpers import GOLDEN, load_golden
from tests.serving.live_server import ROOT, SMOLLM_ENGINE

HEAVY = {"jax", "numpy", "transformers", "tokenizers", "starlette", "uvicorn", "zmq", "pydantic", "rich"}
SMOLLM = "smollm2-135m-instruct"


def run(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120", **environment}
    command = [sys.executable, "-m", "pjengine", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, env=environ, cwd=ROOT)


@pytest.mark.parametrize(
    "command", [[], *([c] for c in ["serve", "worker", "chat", "generate", "embed", "convert", "models"])]
)
def test_help(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")
    assert done.stderr == ""


def test_help_is_quick() -> None:
    """Half a second; measured in CPU time, which other work on the machine does not change."""
    best = min(_cpu_seconds("serve", "--help") for _ in range(3))
    assert best < 0.5


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; import pjengine.serving.cli; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize("command", ["serve", "worker", "chat", "generate", "embed", "rerank"])
def test_every_engine_option_is_a_flag(command: str) -> None:
    text = run(command, "--help").stdout
    for field in dataclasses.fields(EngineConfig):
        if field.name != "model":
            assert re.search(rf"--{field.name.replace('_', '-')}[\s,]", text), field.name


def test_every_engine_option_is_documented() -> None:
    assert set(attribute_docs(EngineConfig)) == {field.name for field in dataclasses.fields(EngineConfig)}


def test_flags_named_as_in_vllm() -> None:
    text = run("serve", "--help").stdout
    for flag in (
        "--max-model-len",
        "--max-num-seqs",
        "--max-num-batched-tokens",
        "--max-batch-tokens",
        "--gpu-memory-utilization",
        "--dtype",
        "--seed",
        "--served-model-name",
        "--host",
        "--port",
        "--api-key",
        "--load-format",
        "--no-enable-prefix-caching",
    ):
        assert re.search(rf"{flag}[\s,]", text), flag


def test_flags_reach_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run_server(options: ServerOptions, config: EngineConfig, queue: QueueOptions | None) -> int:
        seen.extend([options, config, queue])
        return 7

    monkeypatch.setattr("pjengine.serving.server.run_server", run_server)
    arguments = ["serve", "some/model", "--max-model-len", "99", "--no-enable-prefix-caching", "--dtype", "bfloat16"]
    arguments += ["--served-model-name", "a", "--served-model-name", "b", "--port", "1234", "--shutdown-grace", "1.5"]
    result = typer.testing.CliRunner().invoke(app, arguments, env={"PJENGINE_API_KEY": "secret"})
    assert result.exit_code == 7
    assert seen[0] == ServerOptions(port=1234, served_model_names=("a", "b"), api_key="secret", shutdown_grace=1.5)
    assert seen[1] == EngineConfig(model="some/model", max_model_len=99, enable_prefix_caching=False, dtype="bfloat16")
    assert seen[2] is None
    arguments += ["--queue-name", "q", "--queue-timeout", "9", "--max-deliveries", "2"]
    typer.testing.CliRunner().invoke(app, arguments, env={"PJENGINE_QUEUE": "redis://h"})
    assert seen[5] == QueueOptions(url="redis://h", name="q", timeout=9, max_deliveries=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "/no/such/model"], "/no/such/model"),
        (["serve", "no-such-name", "--port", "0"], "smollm2-135m-instruct"),
        (["serve", SMOLLM, "--dtype", "int3"], "dtype: expected one of auto, float32"),
        (["serve", SMOLLM, "--gpu-memory-utilization", "1.5"], "gpu_memory_utilization"),
        (["serve", SMOLLM, "--api-key", ""], "api_key"),
        (["serve", SMOLLM, "--api-key", "secret\n"], "api_key: expected a key of printable characters"),
        (["serve", SMOLLM, "--shutdown-grace", "inf"], "shutdown_grace: expected 0 to 86400"),
        (["serve", SMOLLM, "--log-level", "loud"], "log_level"),
        (["serve", SMOLLM, "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["generate", "/no/such/model", "a"], "/no/such/model"),
        (
            ["generate", SMOLLM, "a", "--compile-cache", "/dev/null/x"],
            "compile_cache: /dev/null/x cannot be made (Not a",
        ),
        (["chat", "/no/such/model"], "/no/such/model"),
        (["embed", "/no/such/model", "a"], "/no/such/model"),
        (["embed", "/no/such/model"], "texts"),
        (["embed", "/no/such/model", "--input", "/no/such/file"], "/no/such/file: cannot be opened"),
        (["embed", SMOLLM, "a", "--id-field", "id", "--on-bad-line", "skip"], "--id-field, --on-bad-line: only with"),
        (["embed", SMOLLM, "a", "--max-batch-tokens", "1000000000000"], "max_num_batched_tokens: expected at most"),
        (["convert", "/no/such/model", "/tmp/nowhere"], "/no/such/model"),
    ],
)
def test_errors_are_one_line(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("pjengine: error: ")
    assert said in line


def test_wrong_flags() -> None:
    done = run("serve", "model", "--max-model-length", "5")
    assert done.returncode == 2
    assert "--max-model-length" in done.stderr


def test_version_and_models() -> None:
    assert run("version").stdout == f"{pjengine.__version__}\n"
    text = run("models").stdout
    for name in ("smollm2-135m-instruct", "all-minilm-l6-v2", "llama", "qwen3", "bert"):
        assert name in text


@pytest.mark.parametrize(
    ("line", "said"),
    [(b"{", "not JSON"), (b'"caf\xe9"', "not JSON"), (b"5", 'a string "text"'), (b'{"txt": "a"}', 'a string "text"')],
)
def test_embed_input_that_is_wrong(tmp_path: Path, line: bytes, said: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'"good"\n\n' + line + b"\n")
    done = run("embed", "all-minilm-l6-v2", "--input", str(file))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"{file}:3" in done.stderr
    assert said in done.stderr


def test_a_mistake_leaves_the_output_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text("of an earlier run")
    command = ["embed", str(GOLDEN / "sentence-transformer"), "a", "--output", str(target)]
    done = run(*command, "--dimensions", "9999")
    assert done.returncode == 1
    assert "dimensions: 9999" in done.stderr
    assert target.read_text() == "of an earlier run"
    assert run(*command).returncode == 0
    (line,) = target.read_text().splitlines()
    assert len(json.loads(line)["embedding"]) == 24


@pytest.mark.real
def test_embed(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "a dog"}\n"a cat"\n')
    done = run("embed", "all-minilm-l6-v2", "a dog", "--input", str(source), "--output", str(target))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert rows[0]["embedding"] == pytest.approx(rows[1]["embedding"], abs=1e-6)
    assert rows[0]["embedding"] != pytest.approx(rows[2]["embedding"], abs=1e-2)
    assert len(rows[0]["embedding"]) == 384


@pytest.mark.real
def test_generate_from_standard_input() -> None:
    arguments = ["--max-tokens", "5", "--temperature", "0", *SMOLLM_ENGINE]
    done = run("generate", SMOLLM, *arguments, stdin="The capital of France is")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


@pytest.mark.real
def test_chat_on_piped_input() -> None:
    """Answers know what was said before; /clear forgets it; a message that does not fit fails alone."""
    questions = ["My name is Zebulon. Please remember it.", "What is my name?", "word " * 600, "/clear", "Say hello."]
    arguments = ["--max-tokens", "24", "--temperature", "0", *SMOLLM_ENGINE]
    done = run("chat", SMOLLM, *arguments, stdin="\n".join(questions) + "\n")
    assert done.returncode == 0, done.stderr
    assert "Zebulon" in done.stdout
    assert "window of 512" in done.stderr
    assert "Hello" in done.stdout.splitlines()[-1]


def _cpu_seconds(*arguments: str) -> float:
    before = os.times()
    run(*arguments)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def test_rerank(tmp_path: Path) -> None:
    golden, metadata = load_golden("cross-encoder")
    first, *others = metadata["texts"]
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in others))
    model = str(GOLDEN / "cross-encoder")
    done = run("rerank", model, metadata["query"], first, "--input", str(file), "--top-n", "2", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    best = golden["scores"].argsort()[::-1][:2].tolist()
    assert [(row["index"], row["document"]) for row in rows] == [(i, metadata["texts"][i]) for i in best]
    assert rows[0]["relevance_score"] == pytest.approx(float(golden["scores"].max()), rel=1e-4)
