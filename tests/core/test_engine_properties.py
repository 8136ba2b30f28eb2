"""Random arrivals, lengths, aborts, priorities and preemptions: nothing leaks, and every text is what it would be
alone.
"""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace
from typing import Never
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pjengine.engine import Engine
from pjengine.errors import EngineOverloaded, InvalidRequest
from pjengine.request import Output, Request
from pjengine.sampling_params import SamplingParams
from tests.core.simulated import EOS, VOCAB, alone, make_engine

PREFIX = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], dict]:
    prompt = PREFIX[: draw(st.integers(0, 16))] + draw(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=20))
    options = {
        "max_tokens": draw(st.integers(1, 24)),
        "n": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "temperature": draw(st.sampled_from([0.0, 1.0])),
        "seed": draw(st.integers(0, 2**64 - 5)),
    }
    return prompt, options


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_every_text_is_what_it_would_be_alone(data: st.DataObject) -> None:
    windows = data.draw(st.sampled_from([(None,), (None, 6), (9,), (4, None)]))
    page_size = data.draw(st.sampled_from([1, 2, 4]))
    pages = data.draw(st.integers(-(-64 // page_size), 3 * (64 // page_size)))
    engine = make_engine(
        windows,
        pages + 1,
        page_size,
        slots=data.draw(st.integers(1, 6)),
        budget=data.draw(st.integers(1, 40)),
        prefix_caching=data.draw(st.booleans()),
        step_sizes=data.draw(st.sampled_from([(), (8, 16, 32), (5,)])),
    )
    texts: dict[tuple[str, int], list[int]] = {}
    expected: dict[tuple[str, int], list[int]] = {}
    reasons: dict[tuple[str, int], str] = {}
    aborted: set[str] = set()

    def step() -> None:
        for output in engine.step():
            key = output.request_id, output.index
            texts[key] += output.token_ids
            if output.finish_reason:
                reasons[key] = output.finish_reason
        engine.check_integrity()

    for i in range(data.draw(st.integers(1, 12))):
        prompt, options = data.draw(requests())
        name = f"r{i}"
        engine.add(
            Request(
                request_id=name,
                prompt_token_ids=prompt,
                params=SamplingParams(**options),
                priority=data.draw(st.integers(0, 2)),
                cache_salt=data.draw(st.sampled_from([None, None, "tenant"])),
            )
        )
        for index in range(options["n"]):
            seed = (options["seed"] + index) % 2**64 if options["temperature"] else None
            expected[name, index] = alone(prompt, options["max_tokens"], windows, seed)
            texts[name, index] = []
        for _ in range(data.draw(st.integers(0, 8))):
            step()
        if data.draw(st.integers(0, 5)) == 0:
            victim = f"r{data.draw(st.integers(0, i))}"
            aborted.add(victim)
            engine.abort(victim)
            engine.check_integrity()
    for _ in range(20_000):
        if not engine.has_work:
            break
        step()
    assert not engine.has_work, "no progress"
    for key, text in expected.items():
        if key[0] in aborted:
            assert texts[key] == text[: len(texts[key])]
        else:
            assert texts[key] == text
            assert reasons[key] == ("stop" if text[-1] == EOS else "length")
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.used_pages) == (0, 0, 0)


def test_a_long_run_with_few_pages_preempts_and_still_tells_the_truth() -> None:
    """Thousands of steps over a pool that holds about three sequences."""
    engine = make_engine((None, 8), pages=40, page_size=4, slots=8, budget=24)
    expected: dict[tuple[str, int], list[int]] = {}
    texts: dict[tuple[str, int], list[int]] = {}
    for i in range(400):
        prompt = PREFIX[: i % 17] + [1 + (i * j) % (VOCAB - 1) for j in range(1, 2 + i % 13)]
        params = SamplingParams(max_tokens=1 + i * 7 % 60, temperature=0, n=1 + (i % 5 == 0))
        engine.add(Request(request_id=f"r{i}", prompt_token_ids=prompt, params=params))
        for index in range(params.n):
            expected[f"r{i}", index] = alone(prompt, params.max_tokens or 0, (None, 8))
            texts[f"r{i}", index] = []
    steps = 0
    while engine.has_work:
        for output in engine.step():
            texts[output.request_id, output.index] += output.token_ids
        steps += 1
        if steps % 10 == 0:
            engine.check_integrity()
    assert texts == expected
    stats = engine.stats()
    assert stats.preemptions > 50, "the pool was meant to be too small"
    assert stats.prefix_cache_hits > 500
    assert steps > 1000


def drain(engine: Engine) -> list[Output]:
    """All that comes until nothing is left to do."""
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def test_equal_prompts_share_pages_and_a_salt_keeps_tenants_apart() -> None:
    engine = make_engine((None,), pages=64, page_size=4, slots=4, budget=64)
    prompt = list(range(1, 18))

    def cached_tokens(name: str, salt: str | None) -> int:
        engine.add(
            Request(request_id=name, prompt_token_ids=prompt, params=SamplingParams(max_tokens=2), cache_salt=salt)
        )
        return max(output.cached_tokens for output in drain(engine))

    assert cached_tokens("a", None) == 0
    assert cached_tokens("b", None) == 16
    assert cached_tokens("c", "tenant") == 0
    assert cached_tokens("d", "tenant") == 16


@pytest.mark.parametrize("failing", ["dispatch", "read"])
def test_a_step_that_failed_leaves_nothing_to_reuse(failing: str) -> None:
    """Its pages hold what was there before, though they were planned to hold the prompt."""
    engine = make_engine((None,), pages=40, page_size=4, slots=4, budget=64)
    prompt, params = list(range(1, 21)), SamplingParams(max_tokens=4, temperature=0)

    def fail(*_: object) -> Never:
        raise MemoryError("out of memory")

    step = SimpleNamespace(bucket_tokens=32, read=fail)
    dispatch = fail if failing == "dispatch" else lambda *_: step
    engine.add(Request(request_id="first", prompt_token_ids=prompt, params=params))
    with mock.patch.object(engine.runner, "dispatch", dispatch), pytest.raises(MemoryError):
        drain(engine)
    engine.abort("first")
    engine.check_integrity()
    engine.add(Request(request_id="second", prompt_token_ids=prompt, params=params))
    outputs = drain(engine)
    engine.check_integrity()
    assert [token for output in outputs for token in output.token_ids] == alone(prompt, 4, (None,))
    assert outputs[0].cached_tokens == 0


def test_siblings_share_the_prompt_until_they_write() -> None:
    engine = make_engine((None,), pages=64, page_size=4, slots=8, budget=64, prefix_caching=False)
    prompt = list(range(1, 31))  # 7 full pages and half of another
    engine.add(
        Request(
            request_id="n", prompt_token_ids=prompt, params=SamplingParams(max_tokens=6, n=4, seed=1, ignore_eos=True)
        )
    )
    engine.step()
    engine.step()
    assert engine.stats().running == 4
    assert engine.stats().used_pages == 7 + 4
    assert engine.stats().step_tokens == 30 + 4  # the parent's next token and three recomputed last tokens


def test_a_higher_priority_runs_first_and_is_preempted_last() -> None:
    engine = make_engine((None,), pages=64, page_size=4, slots=1, budget=64)
    for name, priority in (("low", 5), ("high", -1), ("middle", 0)):
        engine.add(
            Request(request_id=name, prompt_token_ids=[1, 2], params=SamplingParams(max_tokens=1), priority=priority)
        )
    order = []
    while engine.has_work:
        order += [output.request_id for output in engine.step()]
    assert order == ["high", "middle", "low"]


def test_no_more_wait_than_may() -> None:
    engine = make_engine([None], pages=64, page_size=4, slots=2, budget=32)
    engine.max_waiting = 3
    names = itertools.count()

    def fill() -> list[int]:
        """The sequences that run and that wait once no more are taken."""
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        with contextlib.suppress(EngineOverloaded):
            for _ in range(20):
                engine.add(Request(request_id=str(next(names)), prompt_token_ids=[1, 2], params=params))
        return [engine.stats().running, engine.stats().waiting]

    assert fill() == [0, 5]  # two of which run with the next step
    engine.step()
    assert fill() == [2, 3]


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    engine = make_engine((None,), pages=400, page_size=4, slots=4, budget=16)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    engine.add(Request(request_id="long", prompt_token_ids=[3] * 1000, params=params, priority=0))
    engine.add(Request(request_id="short", prompt_token_ids=[4], params=params, priority=1))
    engine.step()
    while engine.stats().running < 2:
        engine.step()
    got = sum(output.request_id == "short" for _ in range(20) for output in engine.step())
    assert got >= 19


def test_prompts_are_cut_to_the_sizes_of_steps() -> None:
    engine = make_engine((None,), pages=400, page_size=4, slots=8, budget=64, step_sizes=(16, 32, 64))
    for i in range(4):
        params = SamplingParams(max_tokens=30, ignore_eos=True)
        engine.add(Request(request_id=str(i), prompt_token_ids=[3 + i] * 25, params=params))
    sizes = []
    for _ in range(5):
        before = engine.stats().step_tokens
        engine.step()
        sizes.append(engine.stats().step_tokens - before)
    # Two decode in the second step (38 tokens could be computed) and three in the third, too few for the smallest size.
    assert sizes == [64, 32, 9, 4, 4]


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ([], {}, "prompt"),
        ([VOCAB], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1] * 2000, {}, "prompt"),
        ([1], {"max_tokens": 10_000}, "max_tokens"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([1], {"allowed_token_ids": (VOCAB,)}, "allowed_token_ids"),
        ([1], {"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
    ],
)
def test_a_wrong_request_is_refused_by_name_and_harms_nobody(prompt: list[int], params: dict, field: str) -> None:
    engine = make_engine((None,), pages=64, page_size=4, slots=4, budget=64)
    engine.add(Request(request_id="good", prompt_token_ids=[5, 6], params=SamplingParams(max_tokens=4, temperature=0)))
    with pytest.raises(InvalidRequest) as error:
        engine.add(Request(request_id="bad", prompt_token_ids=prompt, params=SamplingParams(**params)))
    assert error.value.field == field
    assert field in str(error.value)
    text = []
    while engine.has_work:
        text += [token for output in engine.step() for token in output.token_ids]
    assert text == alone([5, 6], 4, (None,))
