"""A Parquet file that grows in parts: each is whole or not there, and at the end they become one file.

While the job runs, `OUTPUT.parts/000000.parquet` and so on hold a row group each, and how far the input was read. The
output appears when all is done, by one rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pjengine.bulk.rows import Place
from pjengine.bulk.vectors import require_pyarrow, vector_column
from pjengine.errors import InvalidRequest, PJEngineError

_KEY = b"pjengine"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a job is: the input read, rows written, bad lines skipped."""

    place: Place = dataclasses.field(default_factory=Place)
    rows: int = 0
    skipped: int = 0


class Parts:
    """The parts of one output. Use as a context manager: it holds a lock on them.

    Args:
      output: the Parquet file to be.
      job: what decides the vectors (model, fields, …); parts of another job are refused.
      elements: of a vector.
    Raises:
      InvalidRequest: the output exists, or its parts are another job's, or another program writes them.
      ConfigError: pyarrow is not installed.

    Attributes:
      progress: of the parts that are there.
    """

    def __init__(self, output: Path, job: Mapping[str, Any], elements: int):
        pa = require_pyarrow()
        self._parquet = pa.parquet
        self._output = output
        self._folder = _folder(output)
        self._job = _plain(job)
        self._schema = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.float32(), elements))])
        self._elements = elements
        self._count = 0
        self.progress = Progress()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Parts:
        with _reported(self._output):
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = self._stack.enter_context((self._folder / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._stack.close()
            raise InvalidRequest(f"output: another program writes {self._output}", field="output") from None
        try:
            for part in self._parts():
                self.progress = _progress_of(part, self._parquet.read_schema(part).metadata, self._job)
                self._count += 1
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def append(self, ids: list[str], vectors: np.ndarray, progress: Progress) -> None:
        """Writes a part; when it returns, the part will be found by the next start, whatever happens.

        Args:
          vectors: float32 [rows, elements].
          progress: after it.
        """
        pa = require_pyarrow()
        columns = [pa.array(ids, pa.string()), vector_column(vectors.reshape(-1, self._elements))]
        table = pa.table(columns, self._schema.with_metadata(self._metadata(progress)))
        with _reported(self._output), _renamed(self._folder / f"{self._count:06}.parquet") as path:
            self._parquet.write_table(
                table, path, row_group_size=max(len(ids), 1), compression="none", use_dictionary=False
            )
        self._count += 1
        self.progress = progress

    def finish(self) -> None:
        """Makes the output of the parts, a row group in memory at a time, and removes them."""
        schema = self._schema.with_metadata(self._metadata(self.progress))
        with _reported(self._output):
            with (
                _renamed(self._output) as path,
                self._parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer,
            ):
                for part in self._parts():
                    writer.write_table(self._parquet.read_table(part).cast(schema))
            shutil.rmtree(self._folder)

    def _parts(self) -> Iterator[Path]:
        number = 0
        while (path := self._folder / f"{number:06}.parquet").exists():
            yield path
            number += 1

    def _metadata(self, progress: Progress) -> dict[bytes, bytes]:
        return {_KEY: json.dumps({"job": self._job, "progress": dataclasses.asdict(progress)}).encode()}


def finished(output: Path, job: Mapping[str, Any]) -> Progress | None:
    """The progress of a job that has ended; None if its output is not there.

    Raises:
      InvalidRequest: the output is another job's, or not ours.
    """
    if not output.exists():
        return None
    try:
        metadata = require_pyarrow().parquet.read_schema(output).metadata
    except (OSError, ValueError):
        metadata = None
    if not metadata or _KEY not in metadata:
        raise InvalidRequest(f"output: {output} exists; delete it, or give another --output", field="output")
    progress = _progress_of(output, metadata, _plain(job))
    shutil.rmtree(_folder(output), ignore_errors=True)  # it was stopped right before
    return progress


def _folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


def _plain(job: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    return json.loads(json.dumps(dict(job)))


def _progress_of(path: Path, metadata: Mapping[bytes, bytes], job: Mapping[str, Any]) -> Progress:
    found = json.loads(metadata[_KEY])
    differ = [
        f"{name} {found['job'].get(name)!r} (now {value!r})"
        for name, value in job.items()
        if found["job"].get(name) != value
    ]
    if differ:
        raise InvalidRequest(
            f"output: {path} was made with {', '.join(differ)}; give the same, or another --output", field="output"
        )
    progress = found["progress"]
    return Progress(Place(**progress["place"]), progress["rows"], progress["skipped"])


@contextlib.contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """A new file beside `path`, which takes its place once it is written and on the disk."""
    new = path.with_name(f"{path.name}.new")
    yield new
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _reported(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PJEngineError(f"output: {output} cannot be written: {error}") from error
