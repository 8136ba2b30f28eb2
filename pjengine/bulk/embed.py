"""`pjengine embed --output FILE.parquet`: reads, embeds and writes at the same time, a part in memory of each."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from pjengine.bulk.parts import Parts, Progress, finished
from pjengine.bulk.rows import Place, leads_to, read_rows
from pjengine.bulk.vectors import require_pyarrow
from pjengine.config import EngineConfig
from pjengine.errors import ConfigError, InvalidRequest
from pjengine.llm import LLM
from pjengine.models.revision import revision
from pjengine.models.sources import resolve
from pjengine.request_checks import check_prompt

logger = logging.getLogger(__name__)

AHEAD = 2  # parts that are read and tokenized before they are embedded
MOST_SAID = 100  # bad lines that are named
BAD_LINES = ("stop", "skip")
_DECIDES = ("text_field", "id_field", "prompt_name", "dimensions", "truncate_prompt_tokens")  # what the vectors are


@dataclasses.dataclass(frozen=True, kw_only=True)
class BulkOptions:
    """A job.

    Attributes:
      input: JSONL, one text or object a line; "-" is standard input.
      output: the Parquet file, with columns `id` and `embedding`.
      text_field, id_field: of the objects; id_field None: "id" where it is there, else the line's number.
      on_bad_line: "stop": the job ends at a line that has no text or one that cannot be embedded; "skip": it goes on.
      part_rows: texts that are embedded and written at a time: what an interruption may lose; None: 16384, on CPUs 1024
      prompt_name, dimensions, truncate_prompt_tokens: as in `LLM.embed`.
    """

    input: Path
    output: Path
    text_field: str = "text"
    id_field: str | None = None
    on_bad_line: str = "stop"
    part_rows: int | None = None
    prompt_name: str | None = None
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.on_bad_line not in BAD_LINES:
            raise ConfigError(f"on_bad_line: expected one of {', '.join(BAD_LINES)}, got {self.on_bad_line!r}")
        if self.part_rows is not None and self.part_rows < 1:
            raise ConfigError(f"part_rows: expected at least 1, got {self.part_rows!r}")


@dataclasses.dataclass(frozen=True)
class _Part:
    ids: list[str]
    token_ids: list[list[int]]
    place: Place
    skipped: int


def run_bulk(config: EngineConfig, texts: list[str], **options: Any) -> None:
    """`pjengine embed --output FILE.parquet`; options: BulkOptions' fields, `input` may be None."""
    if texts or options["input"] is None:
        raise InvalidRequest("input: a .parquet output takes its texts from --input alone", field="input")
    done = embed_file(BulkOptions(**options), config)
    skipped = f", {done.skipped} bad lines skipped" if done.skipped else ""
    print(f"pjengine: {options['output']}: {done.rows} rows{skipped}", file=sys.stderr)


def embed_file(options: BulkOptions, config: EngineConfig, *, progress: bool = True) -> Progress:
    """Embeds a file of texts, or the rest of it where the same job was interrupted; returns what there is in all.

    Memory is that of a few parts, however long the file is.

    Raises:
      InvalidRequest: a file cannot be used, a line is bad (with its number), or the output is there and not this job's.
      PJEngineError: the output cannot be written.
    """
    require_pyarrow()
    job = {
        "model": Path(config.model).name,
        "revision": revision(resolve(config.model, config.load_format)),
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name in _DECIDES},
    }
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_opened(options.input))
        size = os.fstat(file.fileno()).st_size if file.seekable() else None
        if (done := finished(options.output, job)) is not None:
            longer = size is not None and size != done.place.offset
            if longer or not leads_to(file, done.place) or file.read(1):
                raise InvalidRequest(
                    f"output: {options.output} exists and its input has changed; give another --output", field="output"
                )
            logger.warning("%s is complete: %d rows", options.output, done.rows)
            return done
        llm = stack.enter_context(LLM(**dataclasses.asdict(config)))
        llm.embed([], use_tqdm=False, dimensions=options.dimensions)  # raises what would come up only after reading
        elements = options.dimensions or llm.info.embedding_size
        parts = stack.enter_context(Parts(options.output, job, elements))
        if parts.progress.rows:
            logger.warning("going on after line %d: %d rows are there", parts.progress.place.lines, parts.progress.rows)
        source = _Source(options, llm, file, parts.progress)
        writer = stack.enter_context(ThreadPoolExecutor(1))
        bar = stack.enter_context(
            tqdm(
                total=size,
                initial=parts.progress.place.offset,
                desc="Embedding",
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                disable=not progress,
            )
        )
        written: Future[None] | None = None
        total = parts.progress
        for part in stack.enter_context(contextlib.closing(_ahead(source))):
            results = llm.embed(part.token_ids, use_tqdm=False, prompt_name="", dimensions=options.dimensions)
            vectors = np.array([result.embedding for result in results], np.float32)
            if written is not None:
                written.result()
            rows = total.rows + len(part.ids)
            bar.update(part.place.offset - total.place.offset)
            bar.set_postfix_str(f"{rows} rows")
            total = Progress(part.place, rows, part.skipped)
            written = writer.submit(parts.append, part.ids, vectors, total)
        if written is not None:
            written.result()
        parts.finish()
        return total


class _Source:
    """Parts of the input, tokenized; runs in a thread of its own."""

    def __init__(self, options: BulkOptions, llm: LLM, file: BinaryIO, start: Progress):
        self._options = options
        self._llm = llm
        self._file = file
        self._start = start
        self._skipped = start.skipped

    def __iter__(self) -> Iterator[_Part]:
        options = self._options
        chunks = read_rows(
            self._file,
            self._start.place,
            options.part_rows or (1024 if self._llm.info.device == "cpu" else 16384),
            text_field=options.text_field,
            id_field=options.id_field,
            bad_line=self._bad_line,
        )
        for rows in chunks:
            token_ids = self._llm.tokenize(
                rows.texts, prompt_name=options.prompt_name, truncate_prompt_tokens=options.truncate_prompt_tokens
            )
            good = [i for i, line in enumerate(rows.lines) if self._fits(token_ids[i], line)]
            yield _Part([rows.ids[i] for i in good], [token_ids[i] for i in good], rows.end, self._skipped)

    def _fits(self, token_ids: Sequence[int], line: int) -> bool:
        try:
            check_prompt(list(token_ids), self._llm.info, field=self._options.text_field)
        except InvalidRequest as error:
            self._bad_line(line, str(error))
            return False
        return True

    def _bad_line(self, number: int, fault: str) -> None:
        message = f"{self._options.input}:{number}: {fault}"
        if self._options.on_bad_line == "stop":
            raise InvalidRequest(f"{message}; --on-bad-line skip goes on without it", field="input")
        self._skipped += 1
        if self._skipped - self._start.skipped <= MOST_SAID:
            logger.warning("skipped %s", message)


def _ahead(source: _Source) -> Generator[_Part]:
    """The parts of `source`, made in a thread while those before are used."""
    made: queue.Queue[_Part | BaseException | None] = queue.Queue(AHEAD)
    stopped = threading.Event()

    def put(item: _Part | BaseException | None) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                made.put(item, timeout=0.1)
                return True
        return False

    def make() -> None:
        try:
            for part in source:
                if not put(part):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(1)  # it may hang in a read from a terminal


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be opened: {error.strerror}", field="input") from error
    with file:
        yield file
