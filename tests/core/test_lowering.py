"""Forward steps lowered in other processes: the same programs, also for a GPU that is not there."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.batch import Bucket
from pjengine.device_cache import cache_shapes, make_cache
from pjengine.executables import Compilation, open_store
from pjengine.lowering import LoweringProcesses, Task, export
from pjengine.models.loading import load, model_of
from pjengine.models.sources import resolve
from pjengine.pallas_kernels.backends import Target, current_target
from pjengine.step_programs import RunnerShape, StepPrograms

LLAMA = str(Path(__file__).parent.parent / "golden" / "llama")
BUCKETS = (Bucket(4, 4, True), Bucket(8, 4, False))


def task_of(target: Target, backend: str = "reference") -> tuple[Task, Any]:
    module, params, config = load(LLAMA)
    shape = RunnerShape(BUCKETS, 4, 4, 16, 1, config.vocab_size, backend)
    cache = cache_shapes(module.cache_specs(config), (9,), 16, jnp.float32)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return Task(module.__name__, config, abstract, cache, shape, target), params


def run(task: Task, params: Any, bucket: Bucket, lowered: Any) -> np.ndarray:
    """Logits of a step of a few tokens."""
    programs = task.programs()
    arguments = programs.abstract(bucket)[0]
    tables, tail = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), arguments[2:4])
    layout = programs.layouts[bucket]
    buffer = np.zeros(layout.size, np.int32)
    v = layout.views(buffer)
    v["query_starts"][:] = np.arange(5)
    v["kv_lens"][:] = 1
    v["slots"][:] = np.arange(4)
    v["changes_0"][:4] = [(slot, 0, slot + 1) for slot in range(4)]
    v["token_ids"][:4] = [3, 4, 5, 6]
    return np.asarray(lowered.compile()(params, make_cache(task.cache), tables, tail, buffer)[0])


def test_another_process_lowers_the_same_program() -> None:
    task, params = task_of(current_target())
    programs = task.programs()
    processes = LoweringProcesses(task, programs)
    processes.start(BUCKETS)
    for bucket in BUCKETS:
        np.testing.assert_array_equal(
            run(task, params, bucket, processes.lower(bucket)),
            run(task, params, bucket, programs.lower_forward(bucket)),
        )


def test_what_fails_elsewhere_is_done_here(caplog: pytest.LogCaptureFixture) -> None:
    task, _ = task_of(dataclasses.replace(current_target(), cores=1))  # there is no such CPU
    programs = task.programs()
    processes = LoweringProcesses(task, programs)
    works = programs.all_works(1, processes.lower)[:1]
    made = Compilation(works, open_store("", ()), False, lambda missing: processes.start(BUCKETS[1:]))
    made.begin()
    made.wait()
    assert made.get(BUCKETS[1]) is not None
    assert "another process failed to lower it (EOFError" in caplog.text


def test_a_program_for_a_gpu_that_is_not_here() -> None:
    module, config = model_of(resolve(str(Path(__file__).parents[2] / "benchmarks" / "llama-3.1-8b"), "dummy"))
    config = dataclasses.replace(config, num_layers=2, windows=(None, None))
    shape = RunnerShape(BUCKETS, 4, 4, 64, 1, config.vocab_size, "auto")
    cache = cache_shapes(module.cache_specs(config), (9,), 64, jnp.bfloat16)
    specs = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16),
        module.param_specs(config),
        is_leaf=lambda s: hasattr(s, "axes"),
    )
    target = Target("gpu", 90, 132, "NVIDIA H200")
    programs = StepPrograms(module, config, specs, cache, shape)
    exported = pickle.loads(export(programs, BUCKETS[1], target))
    assert exported.platforms == ("cuda",)
    assert "mosaic_gpu_v2" in exported.mlir_module()
