"""`pjengine generate`, `embed` and `rerank`: one call of `LLM` each."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pjengine.bulk.rows import parse_line
from pjengine.config import EngineConfig
from pjengine.errors import InvalidRequest
from pjengine.llm import LLM
from pjengine.models.sources import resolve
from pjengine.prompts import default_params


def run_generate(config: EngineConfig, prompts: list[str], **sampling: Any) -> None:
    """Prints each prompt's continuation; `sampling`: SamplingParams' fields, None for the model's default."""
    params = default_params(resolve(config.model, config.load_format).default_sampling, **sampling)
    with LLM(**dataclasses.asdict(config)) as llm:
        for result in llm.generate(prompts, params, use_tqdm=len(prompts) > 1):
            print(result.outputs[0].text)


def run_embed(
    config: EngineConfig,
    texts: list[str],
    input_file: Path | None,
    output_file: Path | None,
    text_field: str = "text",
    **how: Any,
) -> None:
    """Writes the embeddings of `texts` and of the input file's lines, as JSONL; `how`: further arguments of `embed`."""
    with contextlib.ExitStack() as stack:
        texts = [*texts, *_read(input_file, stack, text_field)]
        if not texts:
            raise InvalidRequest("texts: there are none; give them as arguments or with --input", field="texts")
        # Opened first, to say at once if that cannot be; what is in it stays until there is something to replace it.
        out = sys.stdout if output_file is None else stack.enter_context(_opened(output_file, "a"))
        llm = stack.enter_context(LLM(**dataclasses.asdict(config)))
        results = llm.embed(texts, use_tqdm=len(texts) > 1, **how)
        if output_file is not None and output_file.is_file():
            out.truncate(0)
        for index, result in enumerate(results):
            print(json.dumps({"index": index, "embedding": result.embedding.tolist()}), file=out)


def run_rerank(
    config: EngineConfig, query: str, documents: list[str], input_file: Path | None, top_n: int | None
) -> None:
    """Prints the documents, from arguments and the input file's lines, as JSONL, the most relevant first."""
    with contextlib.ExitStack() as stack:
        documents = [*documents, *_read(input_file, stack)]
        llm = stack.enter_context(LLM(**dataclasses.asdict(config)))
        for found in llm.rerank(query, documents, top_n, len(documents) > 1, truncate_prompt_tokens=-1):
            row = {"index": found.index, "relevance_score": found.relevance_score, "document": found.document}
            print(json.dumps(row, ensure_ascii=False))


def _read(input_file: Path | None, stack: contextlib.ExitStack, text_field: str = "text") -> list[str]:
    if input_file is None:
        return []
    lines = sys.stdin.buffer if str(input_file) == "-" else stack.enter_context(_opened(input_file, "rb"))
    return list(_texts(lines, input_file, text_field))


@contextlib.contextmanager
def _opened(path: Path, mode: str) -> Iterator[IO[Any]]:
    try:
        file = path.open(mode, encoding=None if "b" in mode else "utf-8")
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be opened: {error.strerror}") from error
    with file:
        yield file


def _texts(lines: Iterable[bytes], path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield parse_line(line, field)[0]
        except ValueError as fault:
            raise InvalidRequest(f"{path}:{number}: {fault}", field="input") from fault
