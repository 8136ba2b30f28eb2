"""Samplers compiled behind the engine's back: something always stands in, and errors come out."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from pjengine.compilation import Compilation
from pjengine.executables import open_store
from pjengine.sampler import Variant
from pjengine.samplers import Samplers, able, common_works, rare_works
from pjengine.sampling_batch import SamplerKey


class Lowered:
    """Compiles to its key's name, once let go."""

    def __init__(self, key: SamplerKey, go: threading.Event):
        self._key, self._go = key, go

    def compile(self, **_: Any) -> Any:
        assert self._go.wait(20)
        if self._key.variant is Variant.TOP_P:
            raise RuntimeError("no such kernel")
        return Compiled(self._key)


class Compiled:
    def __init__(self, key: SamplerKey):
        self.key = key

    def memory_analysis(self) -> None:
        return None


class Compiler:
    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.lowered: list[SamplerKey] = []
        store = open_store("", "test")
        ahead = Compilation([work for rows in (1, 8) for work in common_works(rows, self._lower)], store, False)
        self.late = Compilation([work for rows in (1, 8) for work in rare_works(rows, 50, self._lower)], store, False)
        ahead.begin()
        ahead.wait()
        self.samplers = Samplers(self._lower, ahead, lambda: self.late, store)
        self.go.clear()

    def all_ready(self) -> Compiler:
        self.go.set()
        self.late.begin()
        self.late.wait()
        self.go.clear()
        return self

    def _lower(self, key: SamplerKey) -> Lowered:
        self.lowered.append(key)
        return Lowered(key, self.go)

    def got(self, key: SamplerKey) -> SamplerKey:
        found, compiled = self.samplers.get(key)
        assert compiled.key == found
        return found


@pytest.fixture
def compiler() -> Compiler:
    return Compiler().all_ready()


def test_the_able_one_stands_in_until_the_right_one_is_ready(compiler: Compiler) -> None:
    few = SamplerKey(8, Variant.TOP_K)
    for _ in range(100):
        assert compiler.got(few) == able(8)
    compiler.go.set()
    deadline = time.monotonic() + 20
    while compiler.got(few) != few:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert compiler.lowered.count(few) == 1


def test_what_is_asked_for_once_is_not_compiled_until_all_is_to_settle(compiler: Compiler) -> None:
    few = SamplerKey(8, Variant.TOP_K)
    compiler.go.set()
    assert compiler.got(few) == able(8)
    assert few not in compiler.lowered
    compiler.samplers.settle()
    assert compiler.got(few) == few


def test_what_every_engine_needs_is_ready_at_once(compiler: Compiler) -> None:
    for rows in (1, 8):
        for variant in (Variant.GREEDY, Variant.PLAIN):
            assert compiler.got(SamplerKey(rows, variant)) == SamplerKey(rows, variant)
        assert compiler.got(able(rows)) == able(rows)
        found = compiler.samplers.logprobs(rows)(np.zeros((rows, 50), np.float32), np.zeros(rows, np.int32))
        np.testing.assert_allclose(found.token, -np.log(50), rtol=1e-6)
    assert len(compiler.lowered) == 6


def test_a_stand_in_can_do_all_that_is_asked(compiler: Compiler) -> None:
    small, large = SamplerKey(8, Variant.TOP_K, biases=64), SamplerKey(8, Variant.TOP_K, biases=1024)
    assert compiler.got(small).covers(small)
    compiler.go.set()  # nothing stands in for 1024 adjusted tokens: this one is waited for
    assert compiler.got(large) == large


def test_a_failed_compilation_is_raised(compiler: Compiler) -> None:
    compiler.got(SamplerKey(1, Variant.TOP_P))
    compiler.go.set()
    with pytest.raises(RuntimeError, match="no such kernel"):
        compiler.samplers.settle()


def test_a_rare_wish_waits_for_what_is_compiled_late_and_common_ones_do_not() -> None:
    compiler = Compiler()
    assert compiler.got(SamplerKey(8, Variant.PLAIN)) == SamplerKey(8, Variant.PLAIN)
    compiler.late.begin()
    let_go = threading.Timer(0.2, compiler.go.set)
    let_go.start()
    assert compiler.got(SamplerKey(8, Variant.TOP_K)) == able(8)
    assert compiler.go.is_set()
    assert compiler.lowered.count(able(8)) == 1
