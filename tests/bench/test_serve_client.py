"""The HTTP client and the load, against a server whose delays are known."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pjengine.bench.serve import ServeOptions, ServerUnusable, arrivals, choose_model, probe, serve
from pjengine.bench.serve_client import Endpoint, Form, Load, drive
from pjengine.bench.serve_http import Address, BadResponse, ChunkDecoder, EventDecoder
from pjengine.bench.serve_trace import Trace, summarize
from pjengine.bench.workloads import Item
from pjengine.errors import ConfigError
from tests.bench.scripted_server import (
    BAD_TEXT,
    CUT,
    CUT_STREAM,
    EARLY,
    FAIL,
    FIRST,
    GAP,
    GARBAGE,
    HANG,
    NO_USAGE,
    REFUSE,
    ScriptedServer,
    scripted,
)

SLACK = 0.15  # seconds by which a busy machine may be late


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted() as running:
        yield running


def load(server: ScriptedServer, work: list[Item], due: list[float] | None = None, **options: object) -> list[Trace]:
    """Sends a workload from this process."""
    endpoint: Endpoint = options.pop("endpoint", "completions")  # type: ignore[assignment]
    form = options.pop("form", Form(endpoint))
    assert isinstance(form, Form)
    calls = form.calls("m", work, due or [0.0] * -(-len(work) // form.texts))
    settings = {"concurrency": 100, "timeout": 10.0, **options}
    address = Address.parse(server.url, "key")
    return asyncio.run(drive(Load(address, endpoint, calls, **settings), time.monotonic()))  # type: ignore[arg-type]


def options_for(server: ScriptedServer, **changes: object) -> ServeOptions:
    options: dict[str, object] = {
        "address": Address.parse(server.url),
        "form": Form("completions"),
        "model": "m",
        "rate": float("inf"),
        "concurrency": 16,
        "processes": 2,
        "timeout": 10.0,
        "seed": 0,
    }
    return ServeOptions(**{**options, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_known_delays_are_measured(server: ScriptedServer, endpoint: str) -> None:
    firsts, gaps = [], []
    for _ in range(3):
        traces = load(server, [Item([20, 21, 22], 11)] * 5, endpoint=endpoint)
        assert [t.error for t in traces] == [None] * 5
        for t in traces:
            assert (t.prompt_tokens, t.output_tokens, len(t.arrivals)) == (3, 11, 11)
            assert t.e2el >= FIRST + 10 * GAP
        firsts.append([t.ttft or 0 for t in traces])
        gaps.append([t.tpot or 0 for t in traces])
    assert min(map(min, firsts)) >= FIRST
    assert min(map(min, gaps)) >= GAP
    # A busy machine adds delays of its own, but hardly each time.
    assert min(map(max, firsts)) <= FIRST + SLACK
    assert min(map(max, gaps)) <= GAP + SLACK / 10
    assert all(b"Authorization: Bearer key\r\n" in head for head in server.heads)


def test_what_is_asked_for(server: ScriptedServer) -> None:
    load(server, [Item([20, 21], 3)])
    (body,) = server.bodies
    assert (
        body.items()
        >= {
            "model": "m",
            "prompt": [20, 21],
            "max_tokens": 3,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }.items()
    )


def test_embeddings(server: ScriptedServer) -> None:
    (t,) = load(server, [Item([20, 21, 22], output_len=5)], endpoint="embeddings")
    assert (t.error, t.prompt_tokens, t.ttft, t.asked) == (None, 3, None, 0)
    assert t.e2el >= FIRST


@pytest.mark.parametrize("text", [False, True])
def test_texts_that_share_a_request(server: ScriptedServer, text: bool) -> None:
    form = Form("embeddings", 2, text, "base64")
    traces = load(server, [Item([20 + i] * 3) for i in range(5)], endpoint="embeddings", form=form)
    assert [(t.error, t.texts, t.prompt_tokens) for t in traces] == [(None, 2, 6), (None, 2, 6), (None, 1, 3)]
    inputs = sorted((body["input"] for body in server.bodies), key=len)
    assert [len(given) for given in inputs] == [1, 2, 2]
    assert inputs[0] == (["school school school"] if text else [[24] * 3])
    assert {body["encoding_format"] for body in server.bodies} == {"base64"}
    assert summarize(traces).rates["texts"] == pytest.approx(5 / summarize(traces).seconds)


@pytest.mark.parametrize("form", [{"endpoint": "rank"}, {"endpoint": "chat", "texts": 2}, {"encoding_format": "int8"}])
def test_bad_forms(form: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Form(**{"endpoint": "embeddings", **form})


@pytest.mark.parametrize("endpoint", ["completions", "embeddings"])
def test_connections_are_used_again(server: ScriptedServer, endpoint: str) -> None:
    traces = load(server, [Item([20], 2)] * 6, concurrency=2, endpoint=endpoint)
    assert [t.error for t in traces] == [None] * 6
    assert server.connections == 2


def test_a_connection_that_the_server_closed_is_replaced(server: ScriptedServer) -> None:
    server.requests_per_connection = 1
    traces = load(server, [Item([20], 2)] * 6, concurrency=2)
    assert [t.error for t in traces] == [None] * 6


def test_no_more_in_flight_than_may_be(server: ScriptedServer) -> None:
    traces = load(server, [Item([20], 3)] * 12, concurrency=4)
    assert server.most == 4
    waited = sorted(t.sent - t.due for t in traces)
    one = FIRST + 2 * GAP - 0.005  # seconds of an answer; clocks may differ by a little
    assert waited[3] < one <= waited[4]
    assert waited[8] >= 2 * one


def test_open_loop(server: ScriptedServer) -> None:
    """Requests leave when they are due, whatever is still in flight."""
    due = [0.0, 0.02, 0.04, 0.3]
    traces = load(server, [Item([20], 2)] * 4, due)
    assert server.most == 3
    for t in traces:
        assert 0 <= t.sent - t.due < SLACK


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (REFUSE, "HTTP 400: prompt: refused"),
        (FAIL, "error in the stream: the engine died"),
        (CUT, "the server closed the connection in the middle of an answer"),
        (HANG, "no end within 0.3 s"),
        (NO_USAGE, "the stream ended without its usage (stream_options.include_usage)"),
        (GARBAGE, "no HTTP: the answer begins b'SSH-2.0-OpenSSH'"),
        (BAD_TEXT, "the answer is not UTF-8"),
        (CUT_STREAM, "the stream ended before its usage and [DONE]"),
    ],
)
def test_errors_do_not_touch_others(server: ScriptedServer, script: int, said: str) -> None:
    traces = load(server, [Item([20], 2), Item([script], 2), Item([20], 2), Item([script], 2)], timeout=0.3)
    assert summarize(traces).errors == {said: 2}
    assert [t.output_tokens for t in traces] == [2, 0, 2, 0]


def test_early_ends_are_counted(server: ScriptedServer) -> None:
    found = summarize(load(server, [Item([20], 4), Item([EARLY], 4)]))
    assert (found.completed, found.early, found.output_tokens) == (2, 1, 5)


def test_server_down() -> None:
    with scripted() as gone:
        pass
    (t,) = load(gone, [Item([20], 2)])
    assert t.error is not None
    assert t.error.startswith("connection failed: ")


def test_run_in_processes(server: ScriptedServer) -> None:
    work = [Item([20 + i], 3) for i in range(20)]
    options = options_for(server, rate=100.0)
    found = serve(options, work)
    assert [t.error for t in found.traces] == [None] * 20
    assert sorted(body["prompt"][0] for body in server.bodies) == list(range(20, 40))
    due = [t.due - found.traces[0].due for t in found.traces]
    assert due == pytest.approx(arrivals(20, 100.0, 0))
    assert 0 < found.client_share < 1


def test_arrivals() -> None:
    due = arrivals(20000, 50.0, 1)
    gaps = [b - a for a, b in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    assert due[0] == 0.0
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert sum((g - mean) ** 2 for g in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.06)  # exponential
    assert arrivals(3, float("inf"), 1) == [0.0] * 3


def test_models(server: ScriptedServer) -> None:
    address = Address.parse(f"{server.url}/v1/")
    assert choose_model(address, None) == choose_model(address, "m") == "m"
    with pytest.raises(ServerUnusable, match="the server serves m, not x"):
        choose_model(address, "x")
    with pytest.raises(ServerUnusable, match="HTTP 404: no such path"):
        choose_model(Address.parse(f"{server.url}/other"), None)
    for answer, said in (
        (b'{"data": [{"id": "a"}, {"id": "b"}]}', "the server serves a, b; set --model"),
        (b'{"data": []}', "the server serves nothing; set --model"),
        (b'{"data": [{"id": "\xff"}]}', "is not OpenAI's list of models"),
    ):
        server.models = answer
        with pytest.raises(ServerUnusable, match=said):
            choose_model(address, None)


def test_probe(server: ScriptedServer) -> None:
    probe(options_for(server), Item(list(range(20, 50)), 100))
    assert (len(server.bodies[0]["prompt"]), server.bodies[0]["max_tokens"]) == (8, 2)
    with pytest.raises(ServerUnusable, match="HTTP 400: prompt: refused"):
        probe(options_for(server), Item([REFUSE], 1))
    with pytest.raises(ServerUnusable, match=r"no end within 0\.2 s"):
        probe(options_for(server, timeout=0.2), Item([HANG], 1))


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://", "http://host:99999", "http://[x"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url: "):
        Address.parse(url)


@pytest.mark.parametrize(
    ("url", "host", "port", "prefix"),
    [
        ("http://h", "h", 80, ""),
        ("https://h/", "h", 443, ""),
        ("http://h:1/v1", "h", 1, ""),
        ("http://[::1]:8/api/v1/", "::1", 8, "/api"),
    ],
)
def test_urls(url: str, host: str, port: int, prefix: str) -> None:
    address = Address.parse(url)
    assert (address.host, address.port, address.prefix, address.tls) == (host, port, prefix, url[:5] == "https")


def test_keys_cannot_add_headers() -> None:
    with pytest.raises(ConfigError, match="api_key"):
        Address.parse("http://h", "a\r\nX: y")


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@given(st.lists(st.binary(min_size=1, max_size=40)), st.lists(st.integers(0, 400)))
def test_chunks_however_they_are_cut(chunks: list[bytes], cuts: list[int]) -> None:
    framed = b"".join(b"%x;note=1\r\n%b\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"
    decoder = ChunkDecoder()
    assert b"".join(map(decoder.feed, pieces(framed, cuts))) == b"".join(chunks)
    assert decoder.done


@pytest.mark.parametrize("data", [b"hello\r\n", b"-10\r\n"])
def test_chunk_without_size(data: bytes) -> None:
    with pytest.raises(BadResponse, match="a chunk without its size"):
        ChunkDecoder().feed(data)


@given(
    st.lists(st.text("ab{é ", min_size=1).map(str.strip)),
    st.sampled_from(["\n", "\r\n"]),
    st.lists(st.integers(0, 400)),
)
def test_events_however_they_are_cut(payloads: list[str], end: str, cuts: list[int]) -> None:
    stream = "".join(f": comment{end}data: {payload}{end}{end}" for payload in payloads).encode()
    decoder = EventDecoder()
    found = [payload for piece in pieces(stream, cuts) for payload in decoder.feed(piece)]
    assert found == [payload.encode() for payload in payloads]
