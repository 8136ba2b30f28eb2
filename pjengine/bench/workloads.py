"""The common workloads: deterministic lists of prompt and output lengths, and token ids to fill them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pjengine.errors import ConfigError

_MOST_TOKENS = 1 << 24  # of a prompt: longer than any model's window


@dataclasses.dataclass(frozen=True)
class Item:
    """One request: `output_len` tokens after (for embeddings: nothing after) these prompt tokens."""

    prompt_token_ids: list[int]
    output_len: int = 0


def chat_lengths(count: int = 1000, seed: int = 0) -> list[tuple[int, int]]:
    """ShareGPT-like: log-normal prompt (mean about 200) and output (mean about 200) lengths."""
    random = np.random.default_rng(seed)
    prompts = np.clip(random.lognormal(4.8, 1.1, count), 4, 2048).astype(int)
    outputs = np.clip(random.lognormal(4.9, 0.95, count), 4, 1024).astype(int)
    return list(zip(prompts.tolist(), outputs.tolist(), strict=True))


def query_lengths(count: int = 4096, seed: int = 1) -> list[int]:
    """Search queries: short and skewed (median about 12 tokens, tail to 256)."""
    return np.clip(np.random.default_rng(seed).lognormal(2.5, 0.9, count), 3, 256).astype(int).tolist()


def document_lengths(count: int = 2048, seed: int = 2) -> list[int]:
    return np.clip(np.random.default_rng(seed).lognormal(5.2, 0.6, count), 16, 510).astype(int).tolist()


def fill(lengths: list[int], vocab_size: int, seed: int = 3) -> list[list[int]]:
    """Random token ids, away from both ends of the vocabulary where special tokens live."""
    random = np.random.default_rng(seed)
    margin = min(1000, vocab_size // 4)
    return [random.integers(margin, vocab_size - margin, n).tolist() for n in lengths]


def items(lengths: list[tuple[int, int]], vocab_size: int, seed: int = 3) -> list[Item]:
    """Requests of (prompt length, output length) pairs."""
    prompts = fill([prompt for prompt, _ in lengths], vocab_size, seed)
    return [Item(ids, output) for ids, (_, output) in zip(prompts, lengths, strict=True)]


def read(name: str, vocab_size: int, seed: int = 3) -> list[Item]:
    """A workload by name (chat, queries, docs) or from a file of JSON lines.

    A line is {"prompt_len": 12, "output_len": 34} or {"prompt_token_ids": [1, 2], "output_len": 34}; output_len is 0
    where absent.

    Args:
      seed: of the token ids that fill prompts of which only the length is given.
    Raises: ConfigError naming the file, the line and what is wrong.
    """
    if name == "chat":
        return items(chat_lengths(), vocab_size, seed)
    if name in ("queries", "docs"):
        lengths = query_lengths() if name == "queries" else document_lengths()
        return items([(n, 0) for n in lengths], vocab_size, seed)
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"workload: expected chat, queries, docs or a file of JSON lines, got {name!r}")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"workload: {path} cannot be read as text ({error})") from error
    rows = [_parse(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError(f"workload: {path} is empty")
    filled = fill([row.get("prompt_len", 1) for row in rows], vocab_size, seed)
    return [
        Item(row.get("prompt_token_ids", ids), row.get("output_len", 0)) for row, ids in zip(rows, filled, strict=True)
    ]


def check(name: str, work: Sequence[Item], window: int, vocab_size: int) -> None:
    """Raises: ConfigError naming the first request of a workload that a model cannot take."""
    for number, item in enumerate(work, 1):
        length, most = len(item.prompt_token_ids), max(item.prompt_token_ids)
        if length + item.output_len > window:
            output = f" and {item.output_len} to generate" if item.output_len else ""
            raise ConfigError(
                f"workload: {name}: request {number} has {length} tokens{output}; max_model_len is {window}"
            )
        if most >= vocab_size:
            raise ConfigError(
                f"workload: {name}: request {number}: token id {most} is outside the vocabulary, 0..{vocab_size - 1}"
            )


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"workload: {path}:{number}: not JSON ({error})") from error
    if not isinstance(row, dict) or ("prompt_len" in row) == ("prompt_token_ids" in row):
        raise ConfigError(f"workload: {path}:{number}: needs prompt_len or prompt_token_ids, got {line[:80]}")
    unknown = row.keys() - {"prompt_len", "prompt_token_ids", "output_len"}
    if unknown:
        raise ConfigError(f"workload: {path}:{number}: unknown field {sorted(unknown)[0]!r}")
    for field in ("prompt_len", "output_len"):
        if field in row and not (type(row[field]) is int and row[field] >= (field == "prompt_len")):
            raise ConfigError(f"workload: {path}:{number}: {field}: expected a count, got {row[field]!r}")
    if row.get("prompt_len", 1) > _MOST_TOKENS:
        raise ConfigError(f"workload: {path}:{number}: prompt_len: expected at most {_MOST_TOKENS}, got {line[:80]}")
    ids = row.get("prompt_token_ids", [0])
    if not (isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)):
        raise ConfigError(f"workload: {path}:{number}: prompt_token_ids: expected a list of token ids, got {line[:80]}")
    return row
