"""Batches by token count on a device of simulated time: full, in order, and queries before documents."""

from __future__ import annotations

import dataclasses
import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjengine.embedding_engine import EmbeddingEngine
from pjengine.embedding_runner import embedding_buckets, timed_sizes
from pjengine.engine_info import EngineInfo
from pjengine.errors import EngineOverloaded, InvalidRequest
from pjengine.pallas_kernels.packed.support import LONG
from pjengine.request import Output, Request
from pjengine.token_budget import CurvePoint, knee, measure_curve
from pjengine.waiting_line import LOOKAHEAD, PATIENCE, WaitingLine

BUDGET, MAX_ROWS, WINDOW = 100, 16, 150
FLAT, PER_TOKEN = 2e-3, 5e-5  # seconds of a batch: at least FLAT
HOST = 1e-6  # seconds that pass between two looks at the clock


class Device:
    """A runner whose batches take simulated time; an embedding is the text's first token and its length."""

    budget, max_rows, max_tokens, knee = BUDGET, MAX_ROWS, WINDOW, CurvePoint(40, FLAT)

    def __init__(self) -> None:
        self.time = 0.0
        self.launch = 0.0  # seconds that the host needs to start a batch; the device begins at once
        self.batches: list[Running] = []

    def measure(self) -> list[CurvePoint]:
        return [CurvePoint(tokens, max(FLAT, PER_TOKEN * tokens)) for tokens in (10, 40, 100)]

    def clock(self) -> float:
        self.time += HOST
        return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.time += seconds

    def dispatch(self, requests: list[Request]) -> Running:
        sequences = [one.prompt_token_ids for one in requests]
        start = max([self.time, *(batch.end for batch in self.batches[-1:])])
        seconds = max(FLAT, PER_TOKEN * sum(map(len, sequences)))
        self.time += self.launch
        self.batches.append(Running(self, sequences, start, start + seconds))
        return self.batches[-1]


@dataclasses.dataclass
class Running:
    device: Device
    sequences: list[list[int]]
    start: float
    end: float

    @property
    def bucket_tokens(self) -> int:
        return -(-sum(map(len, self.sequences)) // 10) * 10

    @property
    def done(self) -> bool:
        return self.device.time >= self.end

    def read(self) -> np.ndarray:
        self.device.time = max(self.device.time, self.end)
        return np.array([[s[0], len(s)] for s in self.sequences], np.float32)


def make(**options: object) -> tuple[EmbeddingEngine, Device]:
    device = Device()
    info = EngineInfo("simulated", "embed", vocab_size=10_000, max_model_len=WINDOW, embedding_size=2)
    return EmbeddingEngine(info, device, clock=device.clock, sleep=device.sleep, **options), device  # type: ignore[arg-type]


def request(i: int, tokens: int, input_type: str = "query") -> Request:
    return Request(request_id=str(i), prompt_token_ids=[i] * tokens, input_type=input_type)  # type: ignore[arg-type]


def drain(engine: EmbeddingEngine) -> list[Output]:
    outputs: list[Output] = []
    for _ in range(100_000):
        if not engine.has_work:
            return outputs
        outputs += engine.step()
    raise AssertionError("the engine does not finish")


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.tuples(st.integers(1, WINDOW), st.sampled_from(["query", "document"])), max_size=80),
    steps=st.integers(0, 6),
)
def test_each_text_is_embedded_once(texts: list[tuple[int, str]], steps: int) -> None:
    engine, device = make()
    outputs = []
    for i, (tokens, input_type) in enumerate(texts):
        engine.add(request(i, tokens, input_type))
        if i % 7 < steps:
            outputs += engine.step()
    outputs += drain(engine)
    vectors = {output.request_id: np.frombuffer(output.embedding or b"", "<f4").tolist() for output in outputs}
    assert len(outputs) == len(texts)
    assert vectors == {str(i): [i, tokens] for i, (tokens, _) in enumerate(texts)}
    for batch in device.batches:
        tokens = sum(map(len, batch.sequences))
        assert len(batch.sequences) <= MAX_ROWS
        assert tokens <= BUDGET or len(batch.sequences) == 1
    assert engine.stats().running == engine.stats().waiting == 0
    assert engine.stats().step_tokens == sum(tokens for tokens, _ in texts)


def test_lower_priorities_go_first() -> None:
    engine, device = make()
    priorities = [0, 0, 2, 0, -1, 2, 1, -1]
    for i, priority in enumerate(priorities):
        one = request(i, 60, "document" if i == 4 else "query")
        engine.add(msgspec.structs.replace(one, priority=priority))
    drain(engine)
    order = [s[0] for batch in device.batches for s in batch.sequences]
    assert order == [7, 0, 1, 3, 6, 2, 5, 4], "4 is a document"


def test_a_backlog_fills_batches_and_keeps_the_device_busy() -> None:
    engine, device = make()
    lengths = np.random.default_rng(0).integers(3, 40, 600).tolist()
    for i, tokens in enumerate(lengths):
        engine.add(request(i, tokens))
    drain(engine)
    full = device.batches[:-3]
    assert sum(len(s) for batch in full for s in batch.sequences) > 0.97 * BUDGET * len(full)
    order = [s[0] for batch in device.batches for s in batch.sequences]
    assert max(abs(i - place) for place, i in enumerate(order)) <= LOOKAHEAD + MAX_ROWS
    gaps = [after.start - before.end for before, after in itertools.pairwise(device.batches)]
    assert max(gaps[20:]) == 0, "the next batch was there when one was done"


def test_only_full_batches_of_queries_go_to_the_device_ahead() -> None:
    batches = {}
    for input_type, count in (("query", 40), ("query", 19), ("document", 40)):
        engine, device = make()
        for i in range(10):
            engine.add(request(i, 10))
        drain(engine)  # how long a full batch takes is known then
        for i in range(count):
            engine.add(request(i, 10, input_type))
        outputs = engine.step() + engine.step()
        batches[input_type, count] = [len(batch.sequences) for batch in device.batches[1:]]
        assert len(outputs + drain(engine)) == count
    assert batches == {("query", 40): [10, 10], ("query", 19): [10], ("document", 40): [10]}


def test_documents_hold_up_a_query_by_one_batch_at_most() -> None:
    engine, device = make()
    for i in range(400):
        engine.add(request(i, 45, "document"))
    rng = np.random.default_rng(1)
    longest = PER_TOKEN * BUDGET
    for i in range(1000, 1060):
        until = device.time + float(rng.uniform(0, 4 * longest))
        while device.time < until:
            engine.step()
        came, count = device.time, len(device.batches)
        engine.add(request(i, 5))
        while len(device.batches) == count:
            engine.step()
        batch = device.batches[-1]
        assert batch.sequences[0][0] == i, "before the documents in its batch"
        assert batch.start - came <= longest + EmbeddingEngine.LEAD + EmbeddingEngine.NAP + 1e-4
    assert sum(len(b.sequences) for b in device.batches) > 150, "documents went on"


def test_documents_do_not_starve() -> None:
    line = WaitingLine()
    ids = itertools.count()
    line.add(request(-1, 60, "document"), 0.0)
    line.add(request(-2, WINDOW, "document"), 0.0)
    batches = []
    for _ in range(3 * PATIENCE):
        while line.tokens < 1000:
            line.add(request(next(ids), 10), 0.0)
        batches.append([entry.request.request_id for entry in line.take(BUDGET, MAX_ROWS)])
    assert batches[PATIENCE][0] == "-1"
    assert batches[2 * PATIENCE + 1] == ["-2"], "longer than the budget: alone"
    assert all(len(batch) == 10 for batch in batches[:PATIENCE])


def test_what_does_not_fit_comes_first_next_time() -> None:
    line = WaitingLine()
    for i, tokens in enumerate([60, 50, 30, 45]):
        line.add(request(i, tokens), float(i))
    assert line.oldest == 0.0
    assert [entry.request.request_id for entry in line.take(BUDGET, MAX_ROWS)] == ["0", "2"]
    assert [entry.request.request_id for entry in line.take(BUDGET, MAX_ROWS)] == ["1", "3"]
    assert (len(line), line.tokens, line.oldest) == (0, 0, float("inf"))


def test_a_free_device_does_not_wait_unless_asked_to() -> None:
    engine, device = make()
    engine.add(request(0, 5))
    engine.step()
    assert device.batches[0].start < 1e-4
    drain(engine)

    engine, device = make(max_wait=5e-3)
    engine.add(request(0, 5))
    for i in range(1, 4):
        while device.time < i * 1e-3:
            engine.step()
        engine.add(request(i, 5))
    drain(engine)
    assert [len(batch.sequences) for batch in device.batches] == [4]
    assert device.batches[0].start == pytest.approx(5e-3, abs=3e-4)

    engine, device = make(max_wait=5.0)
    for i in range(4):
        engine.add(request(i, 30))
    engine.step()
    assert device.batches[0].start < 1e-4, "a full batch does not wait"


def test_results_do_not_wait_for_the_next_launch() -> None:
    engine, device = make()
    device.launch = 2 * FLAT
    engine.add(request(0, 5))
    assert engine.step() == []
    engine.add(request(1, 5))
    assert [output.request_id for output in engine.step()] == ["0"]
    assert len(device.batches) == 1
    assert [output.request_id for output in drain(engine)] == ["1"]
    # A batch that still runs when the next one is due is not waited for.
    device.launch = 0.0
    for i in range(2, 5):
        engine.add(request(i, 5))
        engine.step()
    assert device.batches[-1].start == device.batches[-2].end


def test_a_device_does_not_wait_for_results_to_be_handed_out_where_many_wait() -> None:
    engine, device = make()
    device.launch = 2 * FLAT
    engine.add(request(0, 5))
    engine.step()
    for i in range(1, 4):
        engine.add(request(i, BUDGET // 4))
    assert [output.request_id for output in engine.step()] == ["0"]
    assert len(device.batches) == 2


def test_open_loop_latency_is_two_batches() -> None:
    """At 60 % of what the device can do, a query waits for the batch that runs and for its own."""
    engine, device = make()
    rng = np.random.default_rng(2)
    rate = 0.6 / (PER_TOKEN * 10)
    arrivals = np.cumsum(rng.exponential(1 / rate, 2000))
    outputs: list[Output] = []
    sent = 0
    while len(outputs) < len(arrivals):
        while sent < len(arrivals) and arrivals[sent] <= device.time:
            engine.add(arrived(request(sent, 10), arrivals[sent]))
            sent += 1
        if engine.has_work:
            outputs += engine.step()
        else:
            device.time = max(device.time, arrivals[sent])
    latencies = [output.timings.finished for output in outputs if output.timings]
    assert np.percentile(latencies, 99) < 2 * PER_TOKEN * BUDGET + EmbeddingEngine.LEAD


def arrived(one: Request, arrival: float) -> Request:
    return Request(request_id=one.request_id, prompt_token_ids=one.prompt_token_ids, arrival_time=float(arrival))


def test_bad_and_too_many_requests_leave_the_others_alone() -> None:
    engine, _ = make(max_waiting=2)
    engine.add(request(0, 5))
    with pytest.raises(InvalidRequest, match=f"{WINDOW + 1} tokens, but the model's window of {WINDOW}"):
        engine.add(request(1, WINDOW + 1))
    with pytest.raises(InvalidRequest, match="in use"):
        engine.add(request(0, 5))
    engine.add(request(2, 5, "document"))
    with pytest.raises(EngineOverloaded, match="2 requests are waiting"):
        engine.add(request(3, 5))
    engine.abort("2")
    engine.abort("nobody")
    assert [output.request_id for output in drain(engine)] == ["0"]


def test_knee_of_a_flat_then_linear_curve() -> None:
    curve = [CurvePoint(1 << n, max(1e-3, (1 << n) * 1e-3 / 512)) for n in range(4, 15)]
    assert knee(curve).tokens == 512
    assert knee(curve[::-1]).tokens == 512
    assert knee(curve[:3]).tokens == 64, "no saturation in sight: the largest"


def test_knee_is_not_moved_by_a_little_noise() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        curve = [CurvePoint(1 << n, (1e-3 + (1 << n) * 1e-6) * rng.uniform(0.995, 1.005)) for n in range(4, 18)]
        assert knee(curve).tokens in (1 << 15, 1 << 16)


def test_batches_that_take_long_are_not_measured() -> None:
    timed: list[tuple[int, int]] = []

    def seconds(size: int, batches: int) -> float:
        timed.append((size, batches))
        return batches * size / 100

    assert measure_curve([512, 64, 128, 32], seconds) == [
        CurvePoint(32, 0.32),
        CurvePoint(64, 0.64),
        CurvePoint(128, 1.28),
    ]
    assert [size for size, _ in timed if size >= 128] == [128, 128]


def test_shapes_for_long_texts_take_the_kernel_for_long_texts() -> None:
    buckets = embedding_buckets(32768, 1024, 32768, gpu=True)
    long = {bucket.tokens for bucket in buckets if bucket.tokens // bucket.rows >= LONG}
    assert long == {bucket.tokens for bucket in buckets if bucket.tokens >= 2048}
    assert all(b.tokens // b.rows < LONG for b in embedding_buckets(8192, 1024, 512, gpu=True))


def test_a_window_longer_than_a_batch_leaves_the_budget_alone() -> None:
    short, long = (embedding_buckets(max(8192, window), 1024, window, gpu=True) for window in (512, 32768))
    assert max(b.tokens for b in long) == 32768
    assert list(timed_sizes(long)) == list(timed_sizes(short))
    assert timed_sizes(long)[8192] == 1024
    (only,) = embedding_buckets(16, 4, 16, gpu=True)
    assert timed_sizes([dataclasses.replace(only, tokens=32768)]) == {32768: 4}
