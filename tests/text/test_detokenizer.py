"""The incremental detokeniser: however tokens arrive, the text is that of all of them, cut at the first stop string."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pjengine.detokenizer import Detokenizer
from pjengine.sampling_params import SamplingParams
from tests.text.vocabularies import byte_level_metadata, from_metadata, sentencepiece_metadata

BYTES = from_metadata(byte_level_metadata())
PIECES = from_metadata(sentencepiece_metadata())
EMOJI = BYTES.encode("🙂")
(START,), (END,) = BYTES.encode("<|start|>"), BYTES.encode("<|end|>")
REPLACEMENT = "\ufffd"


def chunked(items: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """The items in pieces of the given sizes, repeated as often as needed; sizes may be 0, not all of them."""
    rest = list(items)
    chunks: list[list[int]] = []
    for size in itertools.cycle(sizes):
        if not rest:
            return chunks
        chunks.append(rest[:size])
        rest = rest[size:]
    raise AssertionError("unreachable")


def run(detokenizer: Detokenizer, chunks: list[list[int]]) -> tuple[str, str | None]:
    text = "".join(detokenizer.push(chunk)[0] for chunk in chunks)
    last, stopped = detokenizer.push([], finished=True)
    return text + last, stopped


token_ids = st.lists(st.integers(0, BYTES.vocab_size - 1), max_size=120)
# Bytes of two, three and four byte characters, whole, cut and shuffled.
broken_text = st.lists(st.sampled_from([*EMOJI, *BYTES.encode("é中a b"), 255, START]), max_size=120)
sizes = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


@settings(max_examples=400, deadline=None)
@given(ids=token_ids | broken_text, sizes=sizes, skip=st.booleans())
def test_pieces_make_the_whole_text(ids: list[int], sizes: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(BYTES, [], skip_special_tokens=skip)
    assert run(detokenizer, chunked(ids, sizes)) == (BYTES.decode(ids, skip_special_tokens=skip), None)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="abc é中🙂", max_size=60) | st.text(alphabet="é中🙂", min_size=30, max_size=60), sizes=sizes
)
@example(text=" a", sizes=[1])  # the first token has no text of its own
@example(text="a" * 24 + "éé中a🙂🙂🙂", sizes=[2])
def test_pieces_make_the_whole_text_with_byte_fallback(text: str, sizes: list[int]) -> None:
    ids = PIECES.encode(text, add_special_tokens=False)
    assert run(Detokenizer(PIECES, [PIECES.bos_token_id or 0]), chunked(ids, sizes)) == (PIECES.decode(ids), None)


@settings(max_examples=200, deadline=None)
@given(ids=token_ids | broken_text)
def test_never_half_a_character(ids: list[int]) -> None:
    """What was given out before the end is final: the whole text begins with it."""
    detokenizer = Detokenizer(BYTES, [])
    whole, given_out = BYTES.decode(ids), ""
    for token in ids:
        given_out += detokenizer.push([token])[0]
        assert whole.startswith(given_out)
        assert len(BYTES.decode(ids)) >= len(given_out)


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """End and name of the stop string that is complete first, by trying every prefix of the text."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return end, max(complete, key=len)
    return None


@settings(max_examples=500, deadline=None)
@given(
    text=st.text(alphabet="ab<é🙂", max_size=50),
    stops=st.lists(st.text(alphabet="ab<é🙂", min_size=1, max_size=6), max_size=4),
    sizes=sizes,
    keep=st.booleans(),
)
@example(text="ab<ab<abab", stops=["ab<abab", "<aba"], sizes=[1], keep=False)
def test_stop_strings(text: str, stops: list[str], sizes: list[int], keep: bool) -> None:
    detokenizer = Detokenizer(BYTES, [], stop=stops, include_stop_str_in_output=keep)
    found = first_stop(text, stops)
    expected: tuple[str, str | None] = text, None
    if found is not None:
        end, stop = found
        expected = text[: end if keep else end - len(stop)], stop
    assert run(detokenizer, chunked(BYTES.encode(text), sizes)) == expected


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    detokenizer = Detokenizer(BYTES, [], stop=["<end>"])
    assert detokenizer.push(BYTES.encode("a<en")) == ("a", None)
    assert detokenizer.push(BYTES.encode("x<")) == ("<enx", None)
    assert detokenizer.push(BYTES.encode("end>b")) == ("", "<end>")
    assert detokenizer.push(BYTES.encode("c"), finished=True) == ("", "<end>")  # a text that has stopped stays


def test_what_was_held_back_comes_at_the_end() -> None:
    detokenizer = Detokenizer(BYTES, [], stop=["<end>"])
    assert detokenizer.push([*BYTES.encode("a<e"), *EMOJI[:3]]) == ("a", None)
    assert detokenizer.push([], finished=True) == ("<e" + REPLACEMENT, None)
    other = Detokenizer(BYTES, [], stop=["<end>"])
    assert other.push(BYTES.encode("a<e"), finished=True) == ("a<e", None)


def test_character_across_tokens() -> None:
    detokenizer = Detokenizer(BYTES, [])
    assert [detokenizer.push([token])[0] for token in EMOJI] == ["", "", "", "🙂"]


def test_special_tokens() -> None:
    ids = [START, *BYTES.encode("hello"), END]
    assert run(Detokenizer(BYTES, []), [ids])[0] == "hello"
    assert run(Detokenizer(BYTES, [], skip_special_tokens=False), [ids])[0] == "<|start|>hello<|end|>"


def test_leading_space_depends_on_the_prompt() -> None:
    """SentencePiece drops the space before the first word of a text, not before the first word of an answer."""
    (space_a,) = PIECES.encode("a", add_special_tokens=False)
    assert Detokenizer(PIECES, []).push([space_a])[0] == "a"
    assert Detokenizer(PIECES, PIECES.encode("c")).push([space_a])[0] == " a"


def test_prompt_that_ends_within_a_character() -> None:
    detokenizer = Detokenizer(BYTES, [*BYTES.encode("a"), *EMOJI[:2]])
    assert detokenizer.push(EMOJI[2:])[0] == "🙂"


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_stop_strings_wait_for_min_tokens(chunk: int) -> None:
    ids = BYTES.encode("a.b.c.d")
    detokenizer = Detokenizer(BYTES, [], stop=["."], min_tokens=3)
    assert run(detokenizer, chunked(ids, [chunk])) == ("a.b", ".")


def test_made_from_sampling_params() -> None:
    params = SamplingParams(
        max_tokens=50, min_tokens=3, stop=(".",), include_stop_str_in_output=True, skip_special_tokens=False
    )
    detokenizer = Detokenizer.make(BYTES, [], params)
    assert run(detokenizer, [[START, *BYTES.encode(".a.b")]]) == ("<|start|>.a.", ".")


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    """A model's vocabulary may be padded beyond the tokenizer's."""
    assert run(Detokenizer(BYTES, []), [[65, BYTES.vocab_size + 5, 66]])[0] == BYTES.decode([65, 66])


@pytest.mark.parametrize("tokens", [[255], [65], [START], EMOJI, [*EMOJI[2:], *EMOJI[:2]]])
def test_work_does_not_grow_with_the_sequence(tokens: list[int]) -> None:
    """Even for bytes that never become a character: tokens 3000 to 4000 cost no more than tokens 0 to 1000."""
    detokenizer = Detokenizer(BYTES, [], stop=["a" * 50])
    spans = []
    for _ in range(4):
        start = time.process_time()
        for _ in range(1000 // len(tokens)):
            detokenizer.push(tokens)
        spans.append(time.process_time() - start)
    assert spans[3] < 3 * spans[0] + 0.05
