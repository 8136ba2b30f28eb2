"""Texts from a JSONL file, some at a time, each with the place where it ends."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import orjson

from pjengine.errors import InvalidRequest


@dataclasses.dataclass(frozen=True)
class Place:
    """How far a file has been read: after a whole line.

    Attributes:
      offset: bytes from the file's start; lines: before it.
      sha256: of what it was before the last line and that line, to know all that was read again.
    """

    offset: int = 0
    lines: int = 0
    sha256: str = ""

    def after(self, line: bytes) -> Place:
        return Place(self.offset + len(line), self.lines + 1, hashlib.sha256(self.sha256.encode() + line).hexdigest())


@dataclasses.dataclass(frozen=True)
class Rows:
    """Consecutive texts of a file.

    Attributes:
      ids, texts, lines: of each, its id, text and line number.
      end: after the last of them, and after the bad lines that follow.
    """

    ids: list[str]
    texts: list[str]
    lines: list[int]
    end: Place


def read_rows(
    file: BinaryIO,
    start: Place,
    most: int,
    *,
    text_field: str,
    id_field: str | None,
    bad_line: Callable[[int, str], None],
) -> Iterator[Rows]:
    """Reads on from a place, `most` texts at a time; blank lines do not count.

    Args:
      file: at its start; it need not be seekable.
      id_field: of the objects, a string or integer; None: "id" where it is there, else the line's number.
      bad_line: is told the number and fault of a line without a text, and may raise.
    Raises:
      InvalidRequest: the file does not lead up to `start` as it did.
    """
    if not leads_to(file, start):
        raise InvalidRequest(
            f"input: lines 1 to {start.lines} are not what they were when the job was interrupted; give another "
            "--output, or delete its .parts folder to begin anew",
            field="input",
        )
    place, ids, texts, lines = start, list[str](), list[str](), list[int]()
    for line in file:
        place = place.after(line)
        if not line.strip():
            continue
        try:
            text, row = parse_line(line, text_field)
            row_id = _id(row, id_field, place.lines)
        except ValueError as fault:
            bad_line(place.lines, str(fault))
            continue
        ids.append(row_id)
        texts.append(text)
        lines.append(place.lines)
        if len(texts) == most:
            yield Rows(ids, texts, lines, place)
            ids, texts, lines = [], [], []
    yield Rows(ids, texts, lines, place)


def parse_line(line: bytes | str, text_field: str) -> tuple[str, Mapping[str, Any]]:
    """The text of a line, and the object it came in, empty for a string. ValueError says what is wrong."""
    try:
        value = orjson.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    text, row = (value.get(text_field), value) if isinstance(value, dict) else (value, {})
    if not isinstance(text, str):
        raise ValueError(f'expected a string or an object with a string "{text_field}"')
    return text, row


def _id(row: Mapping[str, Any], field: str | None, number: int) -> str:
    found = row.get(field or "id")
    if found is None and field is None:
        return str(number)
    if isinstance(found, bool) or not isinstance(found, (str, int)):
        raise ValueError(f'expected a string or an integer as "{field or "id"}", got {found!r}')
    return str(found)


def leads_to(file: BinaryIO, place: Place) -> bool:
    """Reads on to a place; whether all before it is what it was when the place was taken.

    Args:
      file: at its start.
    """
    read = Place()
    while read.lines < place.lines and (line := file.readline()):
        read = read.after(line)
    return read == place
