"""Compiling ahead of time: several programs at once, Mosaic kernels before the programs that hold them."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import gc
import logging
import os
import queue
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from tqdm import tqdm

from pjengine.executables import Executable, ExecutableStore
from pjengine.heap import freeze_heap_again
from pjengine.pallas_kernels.backends import current_target
from pjengine.pallas_kernels.kernel_programs import Kernel, kernels_of

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

# Options of XLA. The kernels of a CUDA graph stand in line: one with branches takes the host longer to launch.
IN_LINE: Mapping[str, Any] = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
# The same, and a graph ends at every custom call: the device runs one while the host launches the next.
IN_PIECES: Mapping[str, Any] = {**IN_LINE, "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT"}
CUBLAS: Mapping[str, Any] = {"xla_gpu_enable_triton_gemm": False}  # takes all products
# XLA compares no results when it times products: doing so disturbs those that other threads time (docs/decisions.md).
QUIET_TRIALS: Mapping[str, Any] = {"xla_gpu_autotune_level": 2}
_TURN = 5e-4  # seconds for which the thread that lowers keeps the interpreter from others
_LOWERING = threading.Lock()  # Python traces one at a time; what is compiled late waits for what came before
_PATIENCE = 0.1  # seconds after which who waits to lower looks whether that is still wanted
_COMPILE_STACK = 64 << 20  # bytes; XLA recurses deeply over unrolled layers


@dataclasses.dataclass(frozen=True)
class Work:
    """An executable to make.

    Attributes:
      what: names the kind of program in the log and in the store.
      key: of the executable, unique over all works.
      lower: traces and lowers it: returns a `jax.stages.Lowered`.
      options: of XLA's compiler, beside its defaults.
      wave: of a program that may hold Mosaic kernels: a wave is compiled once the kernels of all its works are, and
        waves come one after the other. None: it holds none, and comes after them.
    """

    what: str
    key: Hashable
    lower: Callable[[], Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wave: int | None = None


class Compilation:
    """Executables on their way: loaded from the store, or compiled in parallel threads, in the order of the works.

    Loading, tracing and lowering start at once. Compiling waits for `begin`: XLA tries kernels out in the device's
    memory, which would leave holes between arrays that are put there meanwhile. Mosaic kernels are compiled before the
    programs that hold them, a wave at a time: neither gets on while the other is compiled (`kernel_programs`).

    Args:
      threads: at most so many compile; None: one a core.
    """

    def __init__(
        self, works: Iterable[Work], store: ExecutableStore, progress: bool = True, threads: int | None = None
    ):
        mosaic = current_target().compute_capability == 90
        self._works: dict[Hashable, Work] = {}
        for work in works:
            self._works.setdefault(work.key, work if mosaic else dataclasses.replace(work, wave=None))
        self._store = store
        self._futures: dict[Hashable, Future[Executable]] = {key: Future() for key in self._works}
        self._begun: set[Hashable] = set()
        self._lowered: dict[Hashable, Any] = {}  # that may not be compiled yet
        self._kernels: dict[Hashable, list[Kernel]] = {}  # of these
        self._compiling: set[Hashable] = set()
        self._kernels_known: set[bytes] = set()
        self._kernels_running: Counter[int | None] = Counter()  # by wave
        self._lock = threading.RLock()  # an engine may be collected, and cancel this, wherever memory is allocated
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None: a thread ends
        self._kept = 0
        self._started = time.monotonic()
        self._bar = tqdm(total=len(self._works), desc="Compiling", disable=not progress, leave=False)
        count = min(len(self._works), threads or os.cpu_count() or 1)
        self._threads = [threading.Thread(target=self._work, name="compile", daemon=True) for _ in range(count)]
        self._lowering = threading.Thread(target=self._prepare, args=(self._load(),), name="lower", daemon=True)
        old = threading.stack_size(_COMPILE_STACK)
        try:
            for thread in (*self._threads, self._lowering):
                thread.start()
        finally:
            threading.stack_size(old)
        self._at_exit = functools.partial(_end_threads_of, weakref.ref(self))
        atexit.register(self._at_exit)

    def begin(self, keys: Collection[Hashable] | None = None) -> None:
        """Lets these (None: all) be compiled."""
        with self._lock:
            self._begun |= self._works.keys() if keys is None else set(keys)
            self._advance()

    def get(self, key: Hashable) -> Executable | None:
        """The executable if it is ready."""
        future = self._futures.get(key)
        if future is None or not future.done() or future.cancelled() or future.exception():
            return None
        return future.result()

    def __getitem__(self, key: Hashable) -> Executable:
        return self._futures[key].result()

    def wait(self, keys: Collection[Hashable] | None = None) -> None:
        """Until these (None: all), which must have begun, are ready. Raises what went wrong with one."""
        for key in self._works if keys is None else keys:
            self._futures[key].result()
        if self.finished:
            self._end_threads()

    @property
    def finished(self) -> bool:
        """Nothing is on its way."""
        return all(future.done() for future in self._futures.values())

    def cancel(self) -> None:
        """Starts nothing more."""
        with self._lock:
            if self.finished:
                return
            for future in self._futures.values():
                future.cancel()
            self._close()

    def _end_threads(self) -> None:
        """A thread that lowers, compiles or frees what it compiled would take down a process that ends meanwhile."""
        if not self.finished:
            self.cancel()
        for thread in (self._lowering, *self._threads):
            thread.join()
        atexit.unregister(self._at_exit)

    # -- in threads of their own -------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # before the next one comes: it holds a whole program

    def _close(self) -> None:
        """Lets the threads end. Called under the lock."""
        self._bar.close()
        for _ in self._threads:
            self._tasks.put(None)

    def _load(self) -> list[tuple[Work, Future[Executable | None]]]:
        """Has all that is kept loaded: by tasks before any that end a thread, so that each will be done."""
        loading: list[tuple[Work, Future[Executable | None]]] = [(work, Future()) for work in self._works.values()]
        for work, future in loading:
            self._tasks.put(functools.partial(_settle, future, self._store.load, work.what, work.key))
        return loading

    def _prepare(self, loading: list[tuple[Work, Future[Executable | None]]]) -> None:
        """Lowers what was not kept, one after the other: Python traces one at a time."""
        missing = []
        for work, future in loading:
            if (found := future.result()) is None:
                missing.append(work)
            else:
                self._kept += 1
                self._end(work.key, found)
        while not _LOWERING.acquire(timeout=_PATIENCE):
            if self.finished:
                return
        try:
            with _without_garbage_collection(), _short_turns():
                for work in missing:
                    self._lower(work)
        finally:
            _LOWERING.release()

    def _lower(self, work: Work) -> None:
        if self._futures[work.key].cancelled():
            return
        started = time.monotonic()
        try:
            lowered = work.lower()
            kernels = kernels_of(lowered) if work.wave is not None else []
        except Exception as error:
            self._end(work.key, error)
            with self._lock:
                self._advance()
            return
        logger.debug("%s: %s lowered in %.2f s", work.what, work.key, time.monotonic() - started)
        with self._lock:
            self._lowered[work.key] = lowered
            self._kernels[work.key] = kernels
            self._advance()

    def _advance(self) -> None:
        """Hands on what may be compiled now. Called under the lock."""
        coming = {k: self._works[k] for k in self._begun - self._compiling if not self._futures[k].done()}
        waves: list[int | None] = [*sorted({work.wave for work in coming.values() if work.wave is not None}), None]
        for wave in waves:
            keys = [key for key, work in self._works.items() if key in coming and work.wave == wave]
            lowered = [key for key in keys if key in self._lowered]
            for kernel in (kernel for key in lowered for kernel in self._kernels.pop(key, ())):
                if kernel.digest not in self._kernels_known:
                    self._kernels_known.add(kernel.digest)
                    self._kernels_running[wave] += 1
                    self._tasks.put(functools.partial(self._compile_kernel, kernel, wave))
            if self._kernels_running[wave] or (wave is not None and len(lowered) < len(keys)):
                return
            for key in lowered:
                self._compiling.add(key)
                self._tasks.put(functools.partial(self._compile, key, self._lowered.pop(key)))

    def _compile_kernel(self, kernel: Kernel, wave: int | None) -> None:
        started = time.monotonic()
        try:
            kernel.compile()
        except Exception as error:  # compiling the program that holds it will say so again
            logger.warning("a kernel cannot be compiled alone (%s)", error)
        logger.debug("kernel %s compiled in %.2f s", kernel, time.monotonic() - started)
        with self._lock:
            self._kernels_running[wave] -= 1
            self._advance()

    def _compile(self, key: Hashable, lowered: Any) -> None:
        if self._futures[key].cancelled():
            return
        work = self._works[key]
        started = time.monotonic()
        try:
            made = Executable.of(lowered.compile(compiler_options=dict(work.options) or None))
            logger.debug("%s: %s compiled in %.2f s", work.what, key, time.monotonic() - started)
            self._store.keep(work.what, key, made)
        except Exception as error:
            self._end(key, error)
        else:
            self._end(key, made)

    def _end(self, key: Hashable, found: Executable | Exception) -> None:
        future = self._futures[key]
        with self._lock:
            if future.cancelled():
                return
            if isinstance(found, Exception):
                logger.warning("%s: %s could not be compiled (%s)", self._works[key].what, key, found)
                future.set_exception(found)
            else:
                future.set_result(found)
            self._bar.update()
            if self.finished:
                self._close()
                self._report()

    def _report(self) -> None:
        made = len(self._works) - self._kept
        logger.info("executables: %d loaded, %d compiled in %.1f s", self._kept, made, time.monotonic() - self._started)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Tracing and lowering make millions of objects that live on; looking through them takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        freeze_heap_again()
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    """Who serves meanwhile asks for the interpreter several times a step, and would wait 5 ms each time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(min(interval, _TURN))
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def _end_threads_of(compilation: weakref.ref[Compilation]) -> None:
    if (found := compilation()) is not None:
        found._end_threads()


def _settle(future: Future[Any], function: Callable[..., Any], *arguments: Any) -> None:
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)


def compile_all(
    lowerings: Mapping[K, Callable[[], Any]],
    what: str,
    store: ExecutableStore,
    progress: bool = True,
    options: Callable[[K], Mapping[str, Any]] = lambda key: {},
) -> dict[K, Any]:
    """Loads or compiles every entry.

    Args:
      lowerings: key -> function that returns a `jax.stages.Lowered`.
      what: names the work in the store.
      options: of XLA's compiler, beside its defaults.
    Returns: key -> `jax.stages.Compiled`.
    """
    works = [Work(what, key, lower, options(key), wave=0) for key, lower in lowerings.items()]
    compilation = Compilation(works, store, progress)
    compilation.begin()
    compilation.wait()
    logger.info("%s are ready", what, extra={"phase": what})
    return {key: compilation[key].call for key in lowerings}
