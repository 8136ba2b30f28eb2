"""Tracing and lowering forward steps in processes of their own: Python does one at a time, in 1 to 2 s each on a GPU
machine, while the threads that compile wait.

`python -m pjengine.lowering` is such a process. It reads a pickled `Task` and keys from standard input and answers
with pickles of (key, exported program); it never touches the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.export

import pjengine
from pjengine.batch import Bucket
from pjengine.pallas_kernels.backends import Target, current_target
from pjengine.step_inputs import KVCache
from pjengine.step_programs import DONATED, RunnerShape, StepPrograms

_KERNEL_CALLS = ("mosaic_gpu_v2", "mosaic_gpu", "__gpu$xla.gpu.triton", "triton_kernel_call")


@dataclasses.dataclass(frozen=True)
class Task:
    """What a process needs to know to make the same `StepPrograms`; `target` is the device they are traced for."""

    module: str
    config: Any
    params: Any
    cache: KVCache
    shape: RunnerShape
    target: Target

    def programs(self) -> StepPrograms:
        return StepPrograms(importlib.import_module(self.module), self.config, self.params, self.cache, self.shape)


class LoweringProcesses:
    """Lowers forward steps of a task; `lower` waits for one of those that `start` was given."""

    def __init__(self, task: Task, programs: StepPrograms):
        self._task = task
        self._programs = programs
        self._exported: dict[Bucket, Future[bytes]] = {}

    def start(self, buckets: Sequence[Bucket]) -> None:
        """Deals the buckets out to processes, in their order."""
        count = max(1, min(len(buckets), (os.cpu_count() or 1) // 2))
        self._exported = {bucket: Future() for bucket in buckets}
        for i in range(count):
            part = buckets[i::count]
            threading.Thread(target=self._run, args=(part,), name="lowering", daemon=True).start()

    def lower(self, bucket: Bucket) -> Any:
        """A `jax.stages.Lowered`, as `StepPrograms.lower_forward` gives it. RuntimeError: the process failed."""
        exported = pickle.loads(self._exported[bucket].result())
        arguments, results = self._programs.abstract(bucket)
        tree = jax.tree.structure(results)

        def forward(*arguments: Any) -> Any:
            return jax.tree.unflatten(tree, exported.call(*jax.tree.leaves(arguments)))

        return jax.jit(forward, donate_argnums=DONATED).lower(*arguments)

    def _run(self, buckets: Sequence[Bucket]) -> None:
        try:
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
            root = str(Path(pjengine.__file__).parents[1])
            environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
            command = [sys.executable, "-m", __name__]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                with process.stdin:
                    process.stdin.write(pickle.dumps((self._task, buckets)))
                for _ in buckets:
                    bucket, exported = pickle.load(process.stdout)
                    self._exported[bucket].set_result(exported)
        except Exception as error:
            failure = RuntimeError(f"{type(error).__name__}: {error}")
            for bucket in buckets:
                if not self._exported[bucket].done():
                    self._exported[bucket].set_exception(failure)


def export(programs: StepPrograms, bucket: Bucket, target: Target) -> bytes:
    """A forward step lowered for a device that need not be here, pickled."""
    arguments, _ = programs.abstract(bucket)
    leaves, tree = jax.tree.flatten(arguments)

    def flat(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(programs.forward(*jax.tree.unflatten(tree, leaves), bucket))

    with _traced_for(target):
        if current_target() != target:
            raise RuntimeError(f"the program would be traced for {current_target()}, not for {target}")
        checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in _KERNEL_CALLS]
        platform = "cuda" if target.platform == "gpu" else target.platform
        exported = jax.export.export(jax.jit(flat), platforms=[platform], disabled_checks=checks)(*leaves)
    # Derivatives are not wanted, and the function that would give them cannot be pickled.
    return pickle.dumps(dataclasses.replace(exported, _get_vjp=None))


def _traced_for(target: Target) -> contextlib.AbstractContextManager[Any]:
    if target.platform != "gpu":
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(
        device_kind=target.device_kind or "", num_cores=target.cores, platform=target.platform
    )
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (jax.sharding.AxisType.Explicit,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between
    task, buckets = pickle.load(sys.stdin.buffer)
    programs = task.programs()
    for bucket in buckets:
        pickle.dump((bucket, export(programs, bucket, task.target)), answers)
        answers.flush()


if __name__ == "__main__":
    main()
