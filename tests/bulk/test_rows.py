"""Reading texts from JSONL, from the start and from the middle."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjengine.bulk.rows import Place, read_rows
from pjengine.errors import InvalidRequest


class Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False


def read(data: bytes, start: Place = Place(), most: int = 3, pipe: bool = False, **options: Any) -> Any:  # noqa: B008
    """(id, text, line) of each row, the bad lines, and the places after each chunk."""
    bad: list[tuple[int, str]] = []
    arguments = {"text_field": "text", "id_field": None, **options}
    file = Pipe(data) if pipe else io.BytesIO(data)
    chunks = list(read_rows(file, start, most, bad_line=lambda number, fault: bad.append((number, fault)), **arguments))
    rows = [row for c in chunks for row in zip(c.ids, c.texts, c.lines, strict=True)]
    return rows, bad, [c.end for c in chunks]


def test_lines_of_all_kinds() -> None:
    data = b'"plain"\n\n{"id": "a", "text": "one", "more": [1]}\n{"id": 7, "text": "two"}\n{"text": "three"}'
    assert read(data)[:2] == ([("1", "plain", 1), ("a", "one", 3), ("7", "two", 4), ("5", "three", 5)], [])


def test_fields_by_name() -> None:
    data = b'{"key": "a", "body": "one", "text": 3}\n"plain"\n{"body": "two"}\n{"key": true, "body": "x"}\n'
    rows, bad, _ = read(data, text_field="body", id_field="key")
    assert rows == [("a", "one", 1)]
    assert [number for number, _ in bad] == [2, 3, 4]
    assert bad[1][1] == 'expected a string or an integer as "key", got None'


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{", "not JSON"),
        (b'"\xff"', "not JSON"),
        (b"[]", 'expected a string or an object with a string "text"'),
        (b'{"text": null}', 'expected a string or an object with a string "text"'),
        (rb'"\ud800"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_lines_are_named(line: bytes, fault: str) -> None:
    rows, ((number, said),), _ = read(b'"a"\n' + line + b'\n"b"\n')
    assert [row[1] for row in rows] == ["a", "b"]
    assert number == 2
    assert fault in said


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.one_of(st.text(max_size=5).map(json.dumps), st.sampled_from(["", "{"]))), st.booleans(), st.booleans()
)
def test_going_on_from_any_place_reads_the_rest(lines: list[str], newline: bool, pipe: bool) -> None:
    data = "\n".join(lines).encode() + b"\n" * newline
    rows, bad, places = read(data)
    for place in places:
        later, later_bad, _ = read(data, place, most=2, pipe=pipe)
        assert later == [row for row in rows if row[2] > place.lines]
        assert later_bad == [fault for fault in bad if fault[0] > place.lines]
    assert places[-1].offset == len(data)


def test_another_file_is_noticed() -> None:
    _, _, (place, *_) = read(b'"a"\n"b"\n"c"\n"d"\n')
    for changed in (b'"a"\n"b"\n"x"\n"d"\n', b'"x"\n"b"\n"c"\n"d"\n', b'"a"\n'):
        with pytest.raises(InvalidRequest, match="lines 1 to 3 are not what they were"):
            read(changed, place)
    assert read(b'"a"\n"b"\n"c"\n"e"\n', place)[0] == [("4", "e", 4)]
