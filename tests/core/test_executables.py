"""Compiling ahead of time: what is begun, what is ready, what fails; steps run in what is ready."""

from __future__ import annotations

import functools
import gc
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pjengine import compilation as compiling
from pjengine.batch import Bucket
from pjengine.compilation import Compilation, Work
from pjengine.config import EngineConfig
from pjengine.engine import Engine
from pjengine.errors import ConfigError, OutOfMemory
from pjengine.executables import open_store, source_digest
from pjengine.factory import make_engine
from pjengine.heap import freeze_heap
from pjengine.model_runner import ModelRunner
from pjengine.pallas_kernels.backends import Target
from pjengine.pallas_kernels.kernel_programs import Kernel
from pjengine.request import Request
from pjengine.sampling_params import SamplingParams
from pjengine.step_programs import cpu_buckets, gpu_buckets

LLAMA = str(Path(__file__).parent.parent / "golden" / "llama")


class Slow:
    """A program whose compilation waits to be let go."""

    def __init__(self, name: str, error: Exception | None = None):
        self.go = threading.Event()
        self.name = name
        self.error = error

    def lower(self) -> Slow:
        return self

    def compile(self, compiler_options: Any = None) -> Any:
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        return jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()


def compilation(*programs: Slow) -> Compilation:
    works = [Work("test", program.name, program.lower) for program in programs]
    return Compilation(works, open_store("", ()), progress=False)


def test_what_is_begun_becomes_ready_and_the_rest_waits() -> None:
    first, second = Slow("first"), Slow("second")
    second.go.set()
    made = compilation(first, second)
    made.begin(["first"])
    first.go.set()
    made.wait(["first"])
    assert made["first"].call(jnp.zeros(3)).tolist() == [1, 1, 1]
    assert made.get("second") is None
    made.begin()
    made.wait()
    assert made.finished
    assert made.get("second") is not None
    assert made.get("third") is None


def test_a_failure_is_said_and_raised_and_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = Slow("good"), Slow("bad", ValueError("no such instruction"))
    good.go.set()
    bad.go.set()
    made = compilation(bad, good)
    made.begin()
    with pytest.raises(ValueError, match="no such instruction"):
        made.wait()
    made.wait(["good"])
    assert made.get("bad") is None
    assert "test: bad could not be compiled (no such instruction)" in caplog.text


def test_after_cancel_nothing_is_compiled() -> None:
    program = Slow("a")
    made = compilation(program)
    made.cancel()
    program.go.set()
    made.begin()
    assert made.finished
    assert made.get("a") is None


def test_kernels_come_before_the_programs_that_hold_them_a_wave_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither compiler gets on while the other works, so they take turns."""
    store = open_store("", ())
    events: list[str] = []
    held = threading.Event()

    class FakeKernel(Kernel):
        def compile(self) -> None:
            assert held.wait(20)
            events.append(self.digest.decode())

    class Program(Slow):
        def compile(self, compiler_options: Any = None) -> Any:
            events.append(self.name)
            return super().compile(compiler_options)

    kernels = {"late": [b"k2", b"k1"], "early": [b"k1"], "early too": [b"k1", b"k3"], "none": [b"unseen"]}
    monkeypatch.setattr(compiling, "current_target", lambda: Target("gpu", 90, 132, "NVIDIA H200"))
    monkeypatch.setattr(
        compiling, "kernels_of", lambda lowered: [FakeKernel(digest, {}) for digest in kernels[lowered.name]]
    )
    programs = {name: Program(name) for name in kernels}
    for program in programs.values():
        program.go.set()
    waves = {"late": 1, "early": 0, "early too": 0, "none": None}
    made = Compilation([Work("test", name, programs[name].lower, wave=waves[name]) for name in kernels], store, False)
    made.begin()
    assert not made.finished
    assert events == []
    held.set()
    made.wait()
    assert sorted(events[:2]) == ["k1", "k3"]
    assert sorted(events) == ["early", "early too", "k1", "k2", "k3", "late", "none"]
    assert events.index("k2") < events.index("late")


def test_a_program_that_cannot_be_lowered_holds_up_no_wave(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise ValueError("no such shape")

    store = open_store("", ())
    monkeypatch.setattr(compiling, "current_target", lambda: Target("gpu", 90, 132, "NVIDIA H200"))
    monkeypatch.setattr(compiling, "kernels_of", lambda lowered: [])
    good = Slow("good")
    good.go.set()
    made = Compilation([Work("test", "bad", refuse, wave=0), Work("test", "good", good.lower, wave=1)], store, False)
    made.begin()
    made.wait(["good"])
    with pytest.raises(ValueError, match="no such shape"):
        made.wait()


def engine(**options: object) -> Engine:
    base = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "page_size": 16}
    made = make_engine(EngineConfig.make(LLAMA, **(base | options)), progress=False)
    assert isinstance(made, Engine)
    return made


def texts(made: Engine) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(5)]
    for i in range(5):
        params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
        made.add(Request(request_id=str(i), prompt_token_ids=list(range(3, 20 + 9 * i)), params=params))
    while made.has_work:
        for output in made.step():
            found[int(output.request_id)] += output.token_ids
    return found


def test_an_eager_start_serves_with_what_is_ready_and_says_the_same() -> None:
    eager = engine(eager_buckets=2)
    assert isinstance(eager.runner, ModelRunner)
    early = texts(eager)
    assert isinstance(eager.runner.executables, Compilation)
    eager.runner.executables.wait()
    steps, padded = eager.stats().steps, eager.stats().padded_tokens
    late = texts(eager)
    assert early == late == texts(engine())
    # With all of them ready, decoding no longer runs in the largest step.
    assert eager.stats().padded_tokens - padded <= 64 * (eager.stats().steps - steps)
    assert eager.runner.step_tokens == 64


def test_the_start_is_logged_with_the_time_of_each_phase(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "pjengine"):
        engine()
    number = r"\d+\.\d"
    phases = ", ".join(f"{phase} {number}" for phase in ("memory plan", "weights", "executables", "cache and tables"))
    assert re.search(rf"ready in {number} s \({phases}\): ", caplog.text)


def test_a_step_that_needs_more_than_its_room_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    made = engine()
    runner = made.runner
    assert isinstance(runner, ModelRunner)
    needed = {b: runner.needed(b) for b in runner.programs.layouts if not b.decode}
    small, large = min(needed), max(needed)
    assert needed[small] < needed[large]

    def again(room: int) -> ModelRunner:
        store = open_store("", ())
        late = functools.partial(Compilation, [], store, progress=False)
        return ModelRunner(runner.programs, runner.executables, late, store, runner.params, frozenset(), room)

    assert again(needed[large]).step_tokens == large.tokens
    assert again(needed[large] - 1).step_tokens == small.tokens
    assert f"{large}: needs" in caplog.text
    with pytest.raises(OutOfMemory, match=r"max_num_batched_tokens: no step fits into the 0\.00 GiB"):
        again(1)


def test_eager_buckets_is_a_count() -> None:
    with pytest.raises(ConfigError, match="eager_buckets: expected at least 1"):
        EngineConfig.make(LLAMA, eager_buckets=0)


@pytest.mark.parametrize("make", [gpu_buckets, cpu_buckets])
@pytest.mark.parametrize(
    ("rows", "tokens"), [(1, 1), (1, 32), (8, 8), (9, 100), (256, 8192), (512, 8192), (3000, 16384)]
)
def test_buckets_hold_every_step(make: Callable[[int, int], tuple[Bucket, ...]], rows: int, tokens: int) -> None:
    buckets = make(rows, tokens)
    assert len(set(buckets)) == len(buckets) <= 25
    decode, mixed = ([b for b in buckets if b.decode is kind] for kind in (True, False))
    assert max(b.rows for b in decode) == rows
    assert max(b.tokens for b in mixed) == tokens
    assert all(b.rows == b.tokens for b in decode)
    for size in {b.tokens for b in mixed}:
        assert max(b.rows for b in mixed if b.tokens == size) == min(size, rows)


def test_steps_full_of_prompts_compute_few_rows_of_logits() -> None:
    buckets = gpu_buckets(512, 4096)
    assert [b.rows for b in sorted(buckets) if b.tokens == 4096] == [64, 512]
    assert [b.rows for b in sorted(gpu_buckets(64, 4096)) if b.tokens == 4096] == [64]


def test_a_gpu_decodes_one_row_as_two() -> None:
    """Unless a second row can never be: XLA's kernels for the norm of one row are slower (docs/decisions.md)."""
    for rows, smallest in ((512, 2), (2, 2), (1, 1)):
        assert min(b.rows for b in gpu_buckets(rows, 4096) if b.decode) == smallest


def test_an_engine_that_is_gone_compiles_nothing_more() -> None:
    made = engine()
    assert isinstance(made.runner, ModelRunner)
    late = made.runner._samplers.compile_late()
    del made
    gc.collect()
    assert late.finished


_ENDS_WHILE_LOWERING = """
import atexit, threading, time
atexit.register(lambda: print("at work:", [t.name for t in threading.enumerate() if t.name in ("lower", "compile")]))
from pjengine.compilation import Compilation, Work
from pjengine.executables import open_store

lowering = threading.Event()
def lower():
    lowering.set()
    time.sleep(0.5)
    raise ValueError("too late")
made = Compilation([Work("test", name, lower) for name in "ab"], open_store("", ()), progress=False)
made.begin()
assert lowering.wait(20)
"""


def test_a_process_that_ends_waits_for_the_thread_that_lowers() -> None:
    """It would be in XLA's hands while the interpreter is taken down, and end the process by a signal."""
    run = [sys.executable, "-c", _ENDS_WHILE_LOWERING]
    done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "at work: []\n"


def test_who_waits_to_lower_and_is_cancelled_waits_no_longer() -> None:
    with compiling._LOWERING:
        made = compilation(Slow("a"))
        made._end_threads()
    assert not made._lowering.is_alive()


def test_programs_stay_in_sight_of_garbage_collection_unless_the_heap_is_frozen() -> None:
    def lower_one() -> int:
        program = Slow("one")
        program.go.set()
        made = compilation(program)
        made.begin()
        made.wait()
        return gc.get_freeze_count()

    assert lower_one() == 0, "an engine of a process that goes on can be freed"
    freeze_heap()
    try:
        frozen = gc.get_freeze_count()
        later: list[list[int]] = [[] for _ in range(1000)]
        assert lower_one() >= frozen + len(later)
    finally:
        gc.unfreeze()


def test_who_serves_while_programs_are_lowered_need_not_wait_long_for_the_interpreter() -> None:
    before, during = sys.getswitchinterval(), []

    class Watching(Slow):
        def lower(self) -> Slow:
            during.append(sys.getswitchinterval())
            return self

    program = Watching("watching")
    program.go.set()
    made = compilation(program)
    made.begin()
    made.wait()
    made._end_threads()
    assert during == [pytest.approx(5e-4)]
    assert sys.getswitchinterval() == pytest.approx(before)


def test_code_and_tables_of_block_sizes_make_other_executables(tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    seen = set()
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("tuned/gpu.json", "{}"), ("tuned/gpu.json", "[]")):
        (tmp_path / name).write_text(text)
        seen.add(source_digest(tmp_path))
    assert len(seen) == 4


def test_without_a_place_for_the_default_cache_an_engine_starts_and_says_so() -> None:
    """As in a container whose home directory cannot be written."""
    code = "from pjengine.executables import use_compile_cache as use; use(None)"
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env["XDG_CACHE_HOME"] = "/dev/null"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "compile_cache: /dev/null/pjengine/compiled cannot be made (Not a directory)" in done.stderr
