"""`pjengine bench serve` and `startup` from the command line."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.testing

from pjengine.phases import PhaseLog
from pjengine.serving.cli import app
from tests.bench.scripted_server import FAIL, HANG, ScriptedServer, scripted
from tests.serving.live_server import fake_command, running, wait_for

ROOT = Path(__file__).parents[2]
LLAMA = str(ROOT / "tests" / "golden" / "llama")


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted() as live:
        yield live


def run(*arguments: str) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "120", "OPENAI_API_KEY": ""})


def workload(tmp_path: Path, *rows: object) -> str:
    file = tmp_path / "w.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_serve_against_the_real_server(tmp_path: Path, endpoint: str) -> None:
    """The server's own HTTP stack, on an engine that needs no model."""
    work = workload(tmp_path, *[{"prompt_len": 5 + i, "output_len": 4 + i} for i in range(20)])
    file = tmp_path / "out.json"
    with running(fake_command(api_key="key")) as live:
        arguments = ["serve", "--base-url", f"{live.url}/v1", "--workload", work, "--vocab-size", "160"]
        arguments += ["--endpoint", endpoint, "--processes", "2", "--concurrency", "8", "--request-rate", "200"]
        done = run(*arguments, "--api-key", "key", "--goodput", "e2el:60000", "--json", str(file))
        assert done.exit_code == 0, done.output
        refused = run(*arguments)
        assert refused.exit_code == 1
        assert "HTTP 401" in refused.stderr
    assert "20 / 0" in done.stdout
    assert "time to first token" in done.stdout
    kept = json.loads(file.read_text())
    (row,) = kept["rows"]
    assert (row["completed"], row["failed"], row["early"]) == (20, 0, 0)
    assert row["output_tokens"] == sum(4 + i for i in range(20))
    if endpoint == "completions":
        assert row["prompt_tokens"] == sum(5 + i for i in range(20))
    assert row["rates"]["good requests"] == row["rates"]["requests"]
    assert (kept["config"]["concurrency"], kept["config"]["rate"]) == (8, "200.0")
    assert (kept["config"]["workload"], kept["config"]["vocab_size"], kept["config"]["repeat"]) == (work, 160, 1)
    assert "key" not in json.dumps(kept["config"])


def test_failures_are_shown_and_fail(tmp_path: Path, server: ScriptedServer) -> None:
    work = workload(tmp_path, {"prompt_len": 3, "output_len": 2}, {"prompt_token_ids": [FAIL], "output_len": 2})
    file = tmp_path / "out.json"
    done = run("serve", "--base-url", server.url, "--workload", work, "--json", str(file))
    assert done.exit_code == 1
    assert "1 / 1" in done.stdout
    assert "failed: 1 × error in the stream: the engine died" in done.stdout
    assert json.loads(file.read_text())["rows"][0]["errors"] == {"error in the stream: the engine died": 1}


def test_embeddings(tmp_path: Path, server: ScriptedServer) -> None:
    work, file = workload(tmp_path, *[{"prompt_len": 5}] * 3), tmp_path / "out.json"
    arguments = ["serve", "--base-url", server.url, "--workload", work, "--endpoint", "embeddings", "--repeat", "2"]
    arguments += ["--texts-per-request", "4", "--send-text", "--encoding-format", "base64", "--json", str(file)]
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "30 / 0" in done.stdout
    assert "texts per second" in done.stdout
    assert "time to first token" not in done.stdout
    kept = json.loads(file.read_text())
    assert (kept["config"]["endpoint"], kept["config"]["texts"], kept["config"]["text"]) == ("embeddings", 4, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base-url", "http://127.0.0.1:9"], "base_url: http://127.0.0.1:9 cannot be reached"),
        (["--base-url", "localhost"], "base_url: expected a URL"),
        (["--base-url", "URL/x"], "/x/v1/models: HTTP 404: no such path"),
        (["--base-url", "URL", "--model", "other"], "model: the server serves m, not other"),
        (["--request-rate", "0"], "request_rate: expected requests per second above 0, or inf, got '0'"),
        (["--request-rate", "nan"], "request_rate: "),
        (["--goodput", "itl:3"], "goodput: "),
        (["--goodput", "ttft:inf"], "goodput: "),
        (["--timeout", "inf"], "timeout: expected seconds, got inf"),
        (["--json", "/no/such/folder/x"], "json: /no/such/folder/x cannot be written"),
        (["--endpoint", "chat", "--texts-per-request", "2"], "endpoint: chat takes one prompt a request"),
        (["--endpoint", "embeddings", "--encoding-format", "int8"], "encoding_format: expected float or base64"),
        (["--endpoint", "images"], "endpoint: expected one of completions, chat, embeddings"),
        (["--workload", "queries"], "needs an output_len of at least 1"),
        (["--workload", "/no/such"], "workload: expected chat"),
    ],
)
def test_serve_errors_are_one_line(server: ScriptedServer, arguments: list[str], said: str) -> None:
    done = run("serve", *(argument.replace("URL", server.url) for argument in arguments))
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("pjengine: error: ")
    assert said in line


def test_startup(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    small = ["--max-num-seqs", "1", "--max-num-batched-tokens", "32", "--num-pages", "8", "--max-model-len", "64"]
    done = run("startup", "--model", LLAMA, *small, "--json", str(file))
    assert done.exit_code == 0, done.output
    kept = json.loads(file.read_text())
    cold, warm = kept["rows"]
    phases = ["imports", "device", "memory plan", "weights", "executables", "cache and tables"]
    assert list(cold) == list(warm) == ["start", *phases, "first token", "total"]
    assert (cold["start"], warm["start"]) == ("cold", "warm")
    for row in (cold, warm):
        assert row["total"] == pytest.approx(sum(v for k, v in row.items() if k not in ("start", "total")))
        assert all(row[phase] >= 0 for phase in phases)
    assert warm["executables"] < 0.7 * cold["executables"]
    assert kept["device"] == "cpu"
    assert kept["roofline"]["copy_bandwidth"] > 0
    assert set(kept["versions"]) == {"pjengine", "python", "jax", "jaxlib", "numpy"}


def test_host(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    done = run("host", "--model", LLAMA, "--batch", "4,8", "--max-num-seqs", "8", "--steps", "20", "--json", str(file))
    assert done.exit_code == 0, done.output
    kept = json.loads(file.read_text())
    assert (kept["device"], kept["options"]) == ("cpu", {"batch": "4,8", "steps": 20, "temperature": 0.0})
    rows = kept["rows"]
    assert [row["batch"] for row in rows] == [4, 8]
    assert all(0 < row["median_ms"] <= row["p90_ms"] for row in rows)
    done = run("host", "--model", LLAMA, "--batch", "9", "--max-num-seqs", "8")
    assert done.exit_code == 1
    assert "batch: expected at most max_num_seqs, 8, got 9" in done.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("decode", ["--batch", "0"], "batch: expected counts of at least 1 separated by commas, got '0'"),
        ("decode", ["--batch", "1,,2"], "batch: expected counts"),
        ("decode", ["--json", "/no/such/folder/x"], "json: /no/such/folder/x cannot be written"),
        ("prefill", ["--shapes", "512x"], "shapes: expected LENGTHxCOUNT pairs such as 512x64,2048x32, got '512x'"),
        ("prefill", ["--shapes", "0x3"], "shapes: "),
        ("prefill", ["--shapes", "8x2,x"], "shapes: "),
        ("prefill", ["--shapes", "8x2x2"], "shapes: "),
        ("throughput", ["--workload", "queries"], "workload: queries: every line needs an output_len of at least 1"),
        ("throughput", ["--workload", "/no/such"], "workload: expected chat"),
        ("embed", ["--workload", "queries"], "task: "),
        ("embed", ["--plot", "/no/such/folder/x.png"], "plot: /no/such/folder/x.png cannot be written"),
    ],
)
def test_what_is_wrong_is_refused_before_the_engine_starts(
    monkeypatch: pytest.MonkeyPatch, command: str, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr("pjengine.factory.make_engine", lambda *_, **__: pytest.fail("the engine starts"))
    done = run(command, "--model", LLAMA, *arguments)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"pjengine: error: {said}")


@pytest.mark.parametrize("arguments", [["decode", "--steps", "0"], ["decode", "--context", "-1"]])
def test_counts_are_at_least_one(arguments: list[str]) -> None:
    done = run(*arguments, "--model", LLAMA)
    assert done.exit_code == 2
    assert f"Invalid value for '{arguments[1]}'" in done.stderr


class TestSmallEngine:
    """What only the engine knows, with one whose programs are compiled once."""

    @pytest.fixture(autouse=True)
    def heap_of_a_process_that_goes_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pjengine.heap.freeze_heap", lambda: None)

    OPTIONS = ("--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--num-pages", "8", "--max-model-len", "96")

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["decode", "--batch", "1,5", "--context", "8", "--steps", "4"], "batch: at most max_num_seqs, 4, run"),
            (["decode", "--batch", "1", "--context", "90", "--steps", "4"], "context, steps: sequences grow to 105"),
            (["decode", "--batch", "3", "--context", "40", "--steps", "8"], "batch: the KV cache does not hold 3"),
            (["prefill", "--shapes", "8x2,96x1"], "shapes: prompts may have 95 tokens (max_model_len is 96), got 96"),
        ],
    )
    def test_errors(self, arguments: list[str], said: str) -> None:
        done = run(*arguments, "--model", LLAMA, *self.OPTIONS)
        assert done.exit_code == 1
        assert done.stderr.splitlines()[-1].strip().startswith(f"pjengine: error: {said}")

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"prompt_len": 90, "output_len": 7}, "request 2 has 90 tokens and 7 to generate; max_model_len is 96"),
            ({"prompt_token_ids": [1, 256], "output_len": 1}, "request 2: token id 256 is outside the vocabulary"),
        ],
    )
    def test_requests_that_the_model_cannot_take(self, tmp_path: Path, row: object, said: str) -> None:
        work = workload(tmp_path, {"prompt_len": 3, "output_len": 1}, row)
        done = run("throughput", "--model", LLAMA, "--workload", work, *self.OPTIONS)
        assert done.exit_code == 1
        assert f"pjengine: error: workload: {work}: {said}" in done.stderr

    def test_a_workload_of_more_requests_than_may_wait(self, tmp_path: Path) -> None:
        work, file = workload(tmp_path, *[{"prompt_len": 3, "output_len": 2}] * 20), tmp_path / "out.json"
        options = ("--workload", work, "--max-waiting", "2", "--json", str(file))
        done = run("throughput", "--model", LLAMA, *options, *self.OPTIONS)
        assert done.exit_code == 0, done.output
        assert "Compiling" not in done.output, "a bar in what is no terminal"
        kept = json.loads(file.read_text())
        assert (kept["rows"][0]["requests"], kept["rows"][0]["output_tokens"]) == (20, 40)
        assert (kept["config"]["max_waiting"], kept["options"]) == (2, {"workload": work})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--model", "/no/such"], "/no/such"), (["--model", LLAMA, "--compile-cache", "x"], "compile_cache: ")],
)
def test_startup_errors(arguments: list[str], said: str) -> None:
    done = run("startup", *arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith("pjengine: error: ")
    assert said in done.stderr


@pytest.mark.parametrize("command", [["plan"], ["bench", "serve"], ["bench", "startup"]])
def test_help(command: list[str]) -> None:
    done = typer.testing.CliRunner().invoke(app, [*command, "--help"])
    assert done.exit_code == 0
    assert "Usage: " in done.stdout


def test_ctrl_c_ends_the_clients_too(server: ScriptedServer, tmp_path: Path) -> None:
    work = workload(tmp_path, {"prompt_len": 3, "output_len": 1}, {"prompt_token_ids": [HANG], "output_len": 1})
    command = [sys.executable, "-m", "pjengine", "bench", "serve", "--base-url", server.url, "--workload", work]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for(lambda: any(body["prompt"] == [HANG] for body in server.bodies), 30)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode != 0
    assert "Traceback" not in err
    wait_for(lambda: server.open == 0)  # the connection has gone with its process


def test_phases_are_the_marked_records() -> None:
    log = PhaseLog()
    for extra in ({}, {"phase": "a"}, {"other": 1}, {"phase": "b"}):
        log.handle(logging.makeLogRecord(extra))
    (a, first), (b, second) = log.ends
    assert (a, b) == ("a", "b")
    assert log.seconds(first - 2.0) == pytest.approx({"a": 2.0, "b": second - first})


def test_phases_hide_no_warning_where_nothing_is_configured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = logging.getLogger("pjengine")
    monkeypatch.setattr(package, "propagate", False)  # pytest has handlers at the root
    with PhaseLog().attached():
        logging.getLogger("pjengine.factory").warning("lowered")
    assert capsys.readouterr().err == "lowered\n"
    assert package.handlers == []
