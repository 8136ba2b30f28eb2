"""Ctrl-C and errors in the middle of a call leave nothing behind, and the LLM usable."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

from pjengine import LLM, SamplingParams
from pjengine.interrupts import deferred_interrupts
from tests.core.simulated import alone

PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def test_interrupt_leaves_no_request_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = llm._engine
    step = engine.step
    steps: list[None] = []

    def interrupted_step() -> Any:
        steps.append(None)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(engine, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2, 3]] * 8, PARAMS, use_tqdm=False)
    assert len(steps) == 5
    assert engine.stats().running == engine.stats().waiting == engine.stats().used_pages == 0
    engine.check_integrity()
    (result,) = llm.generate([4, 5, 6], PARAMS, use_tqdm=False)
    assert result.outputs[0].token_ids[0] == alone([4, 5, 6], 1, [None])[0]


def test_engine_error_leaves_no_request_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = llm._engine
    step = engine.step

    def failing_step() -> Any:
        step()
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", failing_step)
        with pytest.raises(RuntimeError, match="the device is gone"):
            llm.generate([[1, 2, 3]] * 8, PARAMS, use_tqdm=False)
    assert engine.stats().running == engine.stats().waiting == engine.stats().used_pages == 0


def test_interrupts_wait_for_the_check() -> None:
    reached: list[str] = []

    def body() -> None:
        with deferred_interrupts() as check:
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("the check")
            check()
            reached.append("beyond")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert reached == ["the check"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_does_not_wait() -> None:
    reached: list[str] = []

    def body() -> None:
        with deferred_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("the second")
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("beyond")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert reached == ["the second"]


def test_an_interrupt_at_the_very_end_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        os.kill(os.getpid(), signal.SIGINT)


def test_a_programs_own_handler_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with deferred_interrupts() as check:
            os.kill(os.getpid(), signal.SIGINT)
            check()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


def test_other_threads_may_use_it() -> None:
    failures: list[BaseException] = []

    def use() -> None:
        try:
            with deferred_interrupts() as check:
                check()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert failures == []
