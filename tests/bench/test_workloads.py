"""Workloads: the common ones never change, files say what is wrong with them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from pjengine.bench.workloads import Item, chat_lengths, read
from pjengine.errors import ConfigError


def test_chat_is_the_common_one() -> None:
    lengths = chat_lengths()
    assert lengths[:3] == [(139, 413), (105, 179), (245, 161)]
    assert statistics.mean(prompt for prompt, _ in lengths) == pytest.approx(200.927)
    assert statistics.mean(output for _, output in lengths) == pytest.approx(204.047)


@pytest.mark.parametrize(("name", "count"), [("chat", 1000), ("queries", 4096), ("docs", 2048)])
def test_named(name: str, count: int) -> None:
    work = read(name, 32000)
    assert len(work) == count
    assert all(1000 <= token < 31000 for item in work for token in item.prompt_token_ids)
    assert (work[0].output_len > 0) == (name == "chat")


def test_seed_changes_the_ids_alone() -> None:
    one, same, other = read("chat", 500), read("chat", 500), read("chat", 500, seed=4)
    assert one == same != other
    assert [len(i.prompt_token_ids) for i in one] == [len(i.prompt_token_ids) for i in other]


def test_file(tmp_path: Path) -> None:
    file = tmp_path / "w.jsonl"
    rows = [{"prompt_len": 7, "output_len": 3}, {"prompt_token_ids": [5, 6], "output_len": 2}, {"prompt_len": 1}]
    file.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), "utf-8")  # editors on Windows write such a mark
    drawn, given, embedded = read(str(file), 100)
    assert (len(drawn.prompt_token_ids), drawn.output_len) == (7, 3)
    assert given == Item([5, 6], 2)
    assert (len(embedded.prompt_token_ids), embedded.output_len) == (1, 0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("5", "needs prompt_len or prompt_token_ids"),
        ("{}", "needs prompt_len or prompt_token_ids"),
        ('{"prompt_len": 1, "prompt_token_ids": [1]}', "needs prompt_len or prompt_token_ids"),
        ('{"prompt_len": 0}', "prompt_len: expected a count, got 0"),
        ('{"prompt_len": true}', "prompt_len: expected a count, got True"),
        ('{"prompt_len": 2, "output_len": -1}', "output_len: expected a count, got -1"),
        ('{"prompt_len": 1000000000000}', "prompt_len: expected at most 16777216"),
        ("[" * 100_000, "not JSON"),
        ('{"prompt_len": 2, "output": 1}', "unknown field 'output'"),
        ('{"prompt_token_ids": []}', "prompt_token_ids: expected a list of token ids"),
        ('{"prompt_token_ids": [1, -2]}', "prompt_token_ids: expected a list of token ids"),
        ('{"prompt_token_ids": "12"}', "prompt_token_ids: expected a list of token ids"),
    ],
)
def test_bad_lines(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "w.jsonl"
    file.write_text(f'{{"prompt_len": 1}}\n\n{line}\n')
    with pytest.raises(ConfigError) as caught:
        read(str(file), 100)
    assert str(caught.value).startswith(f"workload: {file}:3: ")
    assert said in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe")
    for name, said in ((str(empty), "is empty"), (str(binary), "cannot be read"), ("/no/such", "/no/such")):
        with pytest.raises(ConfigError, match=said):
            read(name, 100)
