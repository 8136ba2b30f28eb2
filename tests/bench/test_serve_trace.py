"""Latencies and rates, against figures worked out by hand."""

from __future__ import annotations

from array import array

import pytest

from pjengine.bench.serve_trace import Trace, parse_limits, summarize
from pjengine.errors import ConfigError


def trace(sent: float, *arrivals: float, due: float = 0.0, asked: int = 0, error: str | None = None) -> Trace:
    finished = arrivals[-1] if arrivals else sent + 1.0
    count = len(arrivals)
    return Trace(due, sent, asked or count, array("d", arrivals), finished, 10, 0 if error else count, error)


def test_of_one_request() -> None:
    found = trace(1.0, 1.5, 1.6, 1.9)
    assert found.ttft == pytest.approx(0.5)
    assert found.tpot == pytest.approx(0.2)
    assert found.e2el == pytest.approx(0.9)
    assert trace(0.0, 1.0).tpot is None


def test_tokens_not_events_make_the_time_per_token() -> None:
    found = trace(0.0, 1.0, 2.0)
    found.output_tokens = 5  # two events brought five tokens
    assert found.tpot == pytest.approx(0.25)


def test_summary() -> None:
    traces = [
        trace(0.0, 0.1, 0.2, 0.4),
        trace(0.1, 0.4, 2.0, due=0.05),
        trace(0.2, error="refused"),
        trace(0.3, error="HTTP 500: x"),
        trace(0.3, error="refused"),
        trace(0.5, 1.0, asked=4),
    ]
    found = summarize(traces, {"ttft": 300.5, "tpot": 150.5})
    assert (found.completed, found.failed, found.early, found.seconds) == (3, 3, 1, 2.0)
    assert found.errors == {"refused": 2, "HTTP 500: x": 1}
    assert list(found.errors) == ["refused", "HTTP 500: x"]
    assert (found.prompt_tokens, found.output_tokens) == (30, 6)
    assert found.rates == {
        "requests": 1.5,
        "good requests": 0.5,
        "input tokens": 15.0,
        "output tokens": 3.0,
        "all tokens": 18.0,
    }
    expected = {  # mean, median; p99 of few values lies just below the largest
        "ttft": (300, 300, 496),
        "tpot": (875, 875, 1585.5),
        "itl": (1900 / 3, 200, 1572),
        "e2el": (2800 / 3, 500, 1872),
        "queued": (50 / 3 + 500 / 3, 50, 491),
    }
    for name, values in expected.items():
        assert list(found.latencies[name].values()) == pytest.approx(values), name


def test_goodput_is_absent_unless_asked_for() -> None:
    assert "good requests" not in summarize([trace(0.0, 1.0)]).rates


def test_nothing_completed() -> None:
    found = summarize([trace(0.0, error="refused")], {"ttft": 1.0})
    assert found.latencies == {}
    assert found.rates["requests"] == found.rates["good requests"] == 0


def test_limits() -> None:
    assert parse_limits("ttft:200, tpot:50.5") == {"ttft": 200.0, "tpot": 50.5}


@pytest.mark.parametrize("text", ["", "ttft", "ttft:", "ttft:fast", "ttft:-1", "ttft:nan", "itl:5", "ttft:1,,"])
def test_bad_limits(text: str) -> None:
    with pytest.raises(ConfigError, match="goodput: expected limits in ms"):
        parse_limits(text)
