"""`pjengine embed --output FILE.parquet` on the real embedded model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from pjengine import LLM
from pjengine.bulk.embed import BulkOptions, embed_file
from pjengine.bulk.parts import Parts, Progress
from pjengine.config import EngineConfig
from pjengine.errors import ConfigError, InvalidRequest, PJEngineError
from tests.serving.live_server import ROOT, wait_for

pytestmark = pytest.mark.real

MODEL = "all-minilm-l6-v2"
# One small bucket: what is tested here is not the engine.
ENGINE = {"max_model_len": 32, "max_num_batched_tokens": 32, "dtype": "float32"}


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": f"row {i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    table = pyarrow.parquet.read_table(path)
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[384]"
    vectors = np.stack(table.column("embedding").to_numpy()) if len(table) else np.empty((0, 384))
    ids = table.column("id").to_pylist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, vectors, strict=True))


def run(source: Path, target: Path, **options: object) -> Progress:
    given = BulkOptions(input=source, output=target, **options)  # type: ignore[arg-type]
    return embed_file(given, EngineConfig.make(MODEL, **ENGINE), progress=False)


def command(source: Path, target: Path, *arguments: str) -> list[str]:
    engine = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    return [
        *(sys.executable, "-m", "pjengine", "embed", MODEL),
        *engine,
        "--input",
        str(source),
        "--output",
        str(target),
        *arguments,
    ]


def test_killed_again_and_again_it_ends_with_every_row_once(tmp_path: Path) -> None:
    texts = [f"text {i} of many" for i in range(400)]
    source, target = write(tmp_path / "texts.jsonl", texts), tmp_path / "vectors.parquet"
    parts = tmp_path / "vectors.parquet.parts"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def count() -> int:
        return len(list(parts.glob("*.parquet")))

    for _ in range(2):
        before = count()
        with subprocess.Popen(command(source, target, "--part-rows", "4"), env=environment) as process:
            wait_for(lambda before=before: count() >= before + 5 or target.exists(), 60)  # type: ignore[misc]
            process.send_signal(signal.SIGKILL)
        assert not target.exists(), "it was to be killed earlier"
        assert count() >= before + 5
    written = sorted(parts.glob("*.parquet"))
    times = [path.stat().st_mtime_ns for path in written]
    (parts / "000099.parquet.new").write_bytes(b"half of a part")  # as a kill leaves it
    done = subprocess.run(command(source, target), env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f"going on after line {4 * len(written)}" in done.stderr
    assert "400 rows" in done.stderr
    assert len(times) < 100
    assert not parts.exists()
    found = read(target)
    assert list(found) == [f"row {i}" for i in range(400)]
    with LLM(MODEL, **ENGINE) as llm:
        expected = np.stack([result.embedding for result in llm.embed(texts, use_tqdm=False)])
    np.testing.assert_allclose(np.stack(list(found.values())), expected, rtol=0, atol=1e-5)
    again = subprocess.run(command(source, target), env=environment, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0
    assert "is complete: 400 rows" in again.stderr


def test_bad_lines_stop_or_are_skipped(tmp_path: Path) -> None:
    source, target = tmp_path / "texts.jsonl", tmp_path / "vectors.parquet"
    too_long = json.dumps("word " * 100)
    source.write_text(f'"a"\n"b"\n{{}}\n{too_long}\n"c"\n{{\n')
    with pytest.raises(InvalidRequest, match=r"texts\.jsonl:3: expected a string or an object .* --on-bad-line skip"):
        run(source, target, part_rows=2)
    assert not target.exists()
    done = run(source, target, part_rows=2, on_bad_line="skip")  # goes on after the two rows before the bad line
    assert (done.rows, done.skipped, done.place.lines) == (3, 3, 6)
    assert list(read(target)) == ["1", "2", "5"]
    with pytest.raises(InvalidRequest, match=r"vectors\.parquet was made with truncate_prompt_tokens None \(now -1\)"):
        run(source, target, truncate_prompt_tokens=-1)
    whole = tmp_path / "whole.parquet"
    assert run(source, whole, on_bad_line="skip", truncate_prompt_tokens=-1).rows == 4
    with source.open("a") as file:
        file.write('"d"\n')
    with pytest.raises(InvalidRequest, match="its input has changed"):
        run(source, target)


def test_a_finished_job_looks_at_its_input(tmp_path: Path) -> None:
    source, target = write(tmp_path / "texts.jsonl", ["one", "two"]), tmp_path / "vectors.parquet"
    run(source, target)
    piped = [*command(Path("-"), target)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    lines = source.read_bytes()
    for given, code, said in ((lines, 0, "is complete: 2 rows"), (lines + b'"c"\n', 1, "its input has changed")):
        done = subprocess.run(piped, input=given, env=environment, capture_output=True, timeout=100)
        assert done.returncode == code, done.stderr
        assert said in done.stderr.decode()
    source.write_bytes(lines.replace(b"one", b"six"))
    with pytest.raises(InvalidRequest, match="its input has changed"):
        run(source, target)


def test_nothing_but_an_empty_file(tmp_path: Path) -> None:
    source, target = tmp_path / "texts.jsonl", tmp_path / "vectors.parquet"
    source.touch()
    assert run(source, target).rows == 0
    assert read(target) == {}


def test_wrong_uses_are_named(tmp_path: Path) -> None:
    source, target = write(tmp_path / "texts.jsonl", ["a"]), tmp_path / "vectors.parquet"
    with pytest.raises(InvalidRequest, match="nowhere: cannot be opened"):
        run(tmp_path / "nowhere", target)
    with pytest.raises(ConfigError, match="on_bad_line: expected one of stop, skip"):
        run(source, target, on_bad_line="go")
    with pytest.raises(ConfigError, match="part_rows"):
        run(source, target, part_rows=0)
    target.write_text("mine")
    with pytest.raises(InvalidRequest, match=r"output: .*vectors\.parquet exists"):
        run(source, target)
    assert target.read_text() == "mine"
    with Parts(tmp_path / "other.parquet", {}, 4), pytest.raises(InvalidRequest, match="another program writes"):
        Parts(tmp_path / "other.parquet", {}, 4).__enter__()
    (tmp_path / "file").touch()
    with pytest.raises(PJEngineError, match="cannot be written"):
        Parts(tmp_path / "file" / "x.parquet", {}, 4).__enter__()


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """Of reading and writing; 20 parts may take no more than 2, but for what an allocator keeps."""
    rows, elements = 2000, 1024
    vectors = np.zeros((rows, elements), np.float32)
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from pjengine.bulk.parts import Parts, Progress
vectors = np.zeros((2000, 1024), np.float32)
with Parts(Path(sys.argv[1]), {}, 1024) as parts:
    for i in range(int(sys.argv[2])):
        parts.append([str(i)] * 2000, vectors, Progress(rows=2000 * (i + 1)))
    parts.finish()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
"""
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", code, str(tmp_path / f"{n}.parquet"), str(n)], cwd=ROOT))
        for n in (2, 20)
    ]
    assert peaks[1] - peaks[0] < 4 * vectors.nbytes


def test_another_model_in_a_folder_of_the_same_name_is_another_job(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(ROOT / "tests" / "golden" / "sentence-transformer", model)
    source, target = write(tmp_path / "in.jsonl", ["one", "two"]), tmp_path / "out.parquet"

    def embed() -> Progress:
        config = EngineConfig.make(str(model), **ENGINE)
        return embed_file(BulkOptions(input=source, output=target), config, progress=False)

    assert embed().rows == embed().rows == 2
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(InvalidRequest, match=r"output: .*out\.parquet"):
        embed()
