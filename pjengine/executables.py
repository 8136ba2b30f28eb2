"""Compiling ahead of time: one executable per static shape, several at once, kept on disk for the next start."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import logging
import os
import pickle
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from tqdm import tqdm

import pjengine
from pjengine.models.embedded import cache_directory
from pjengine.pallas_kernels.backends import current_target, load_runtime
from pjengine.pallas_kernels.kernel_programs import Kernel, kernels_of

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

# Options of XLA. The kernels of a CUDA graph stand in line: one with branches takes the host longer to launch.
IN_LINE: Mapping[str, Any] = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
CUBLAS: Mapping[str, Any] = {"xla_gpu_enable_triton_gemm": False}  # takes all products
_COMPILE_STACK = 64 << 20  # bytes; XLA recurses deeply over unrolled layers


@dataclasses.dataclass(frozen=True)
class Executable:
    """A `jax.stages.Compiled`, and what a call needs of the device's memory beside its arguments, in bytes.

    Attributes:
      temporaries: only while it runs.
      outputs: results that are not written over a donated argument.
    """

    call: Any
    temporaries: int
    outputs: int

    @classmethod
    def of(cls, compiled: Any) -> Executable:
        found = compiled.memory_analysis()
        if found is None:  # not every backend tells
            return cls(compiled, 0, 0)
        outputs = max(0, found.output_size_in_bytes - found.alias_size_in_bytes)
        return cls(compiled, found.temp_size_in_bytes, outputs)


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


class Executables(Protocol):
    """Executables by key, as a `Compilation` has them."""

    @property
    def finished(self) -> bool: ...
    def get(self, key: Hashable) -> Executable | None: ...
    def __getitem__(self, key: Hashable) -> Executable: ...


class ExecutableStore:
    """Serialized executables of one program in one setting. Skips tracing, lowering and compiling on later starts.

    The files are pickles, which run code when read: a directory that others could write to is not used.
    """

    def __init__(self, directory: Path | None, setting: object):
        """directory: None: nothing is kept. setting: whatever changes the executables besides their keys."""
        self._directory = directory
        load_runtime(current_target())
        device = jax.devices()[0]
        parts = (
            _source_digest(),
            jax.__version__,
            device.client.platform_version,
            device.device_kind,
            os.environ.get("XLA_FLAGS", ""),
            setting,
        )
        self._setting = repr(parts)

    def load(self, what: str, key: object) -> Executable | None:
        """The kept executable, or None."""
        path = self._path(what, key)
        if path is None or not path.is_file():
            return None
        try:
            serialized, temporaries, outputs = pickle.loads(path.read_bytes())
            return Executable(deserialize_and_load(*serialized), temporaries, outputs)
        except Exception as error:  # whatever a truncated file or another driver may raise: compiling anew mends it
            logger.warning("%s cannot be loaded (%s); compiling it again", path, error)
            return None

    def keep(self, what: str, key: object, made: Executable) -> None:
        path = self._path(what, key)
        if path is None:
            return
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            partial.write_bytes(pickle.dumps((serialize(made.call), made.temporaries, made.outputs)))
            partial.rename(path)
        except Exception as error:  # a full disk, or what cannot be serialized: the next start compiles it again
            logger.warning("%s cannot be kept (%s)", path, error)

    def _path(self, what: str, key: object) -> Path | None:
        if self._directory is None:
            return None
        digest = hashlib.sha256(f"{self._setting} {what} {key!r}".encode()).hexdigest()
        return self._directory / f"{digest[:40]}.executable"


def open_store(directory: str | None, setting: object) -> ExecutableStore:
    """The store in a compile cache directory (None: the XDG cache directory; "": nothing is kept).

    GPUs only: an XLA CPU executable that came out of JAX's compilation cache lacks functions once serialized again
    ("Function wrapped_slice.2 not found", jax 0.10.2), so CPUs have JAX's cache alone.
    """
    if directory == "" or jax.default_backend() == "cpu":
        return ExecutableStore(None, setting)
    path = (Path(directory) if directory else cache_directory() / "compiled") / "executables"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        logger.warning("compile_cache: %s can be written by others, so executables are not kept there", path)
        return ExecutableStore(None, setting)
    return ExecutableStore(path, setting)


def use_compile_cache(directory: str | None) -> None:
    """Points JAX's own compilation cache at a directory, unless the program has chosen one already.

    It serves what is compiled when first needed; what is compiled ahead of time has the ExecutableStore.

    Args:
      directory: None: the XDG cache directory; "": no cache.
    """
    if directory == "" or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    path = Path(directory) if directory else cache_directory() / "compiled"
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Compilation:
    """Executables on their way: loaded from the store, or compiled in parallel threads, in the order of the works.

    Loading, tracing and lowering start at once. Compiling waits for `begin`: XLA tries kernels out in the device's
    memory, which would leave holes between arrays that are put there meanwhile. Mosaic kernels are compiled before the
    programs that hold them, a wave at a time: neither gets on while the other is compiled (`kernel_programs`).
    """

    def __init__(self, works: Iterable[Work], store: ExecutableStore, progress: bool = True):
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
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._kept = 0
        self._started = time.monotonic()
        self._bar = tqdm(total=len(self._works), desc="Compiling", disable=not progress, leave=False)
        old = threading.stack_size(_COMPILE_STACK)
        try:
            for _ in range(min(len(self._works), os.cpu_count() or 1)):
                threading.Thread(target=self._work, name="compile", daemon=True).start()
            threading.Thread(target=self._prepare, name="lower", daemon=True).start()
        finally:
            threading.stack_size(old)

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

    @property
    def finished(self) -> bool:
        """Nothing is on its way."""
        return all(future.done() for future in self._futures.values())

    def cancel(self) -> None:
        """Starts nothing more."""
        with self._lock:
            for future in self._futures.values():
                future.cancel()
            self._bar.close()

    # -- in threads of their own -------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self.finished:
            with contextlib.suppress(queue.Empty):
                self._tasks.get(timeout=0.2)()

    def _prepare(self) -> None:
        """Loads what is kept and lowers the rest, one after the other: Python traces one at a time."""
        loading: list[tuple[Work, Future[Executable | None]]] = []
        for work in self._works.values():
            loading.append((work, Future()))
            self._tasks.put(functools.partial(_settle, loading[-1][1], self._store.load, work.what, work.key))
        missing = []
        for work, future in loading:
            if (found := future.result()) is None:
                missing.append(work)
            else:
                self._kept += 1
                self._end(work.key, found)
        with _without_garbage_collection():
            for work in missing:
                self._lower(work)

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
                self._bar.close()
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
        if enabled:
            gc.enable()


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


def _source_digest() -> str:
    """Of every Python file of the package: any change of code makes other executables."""
    digest = hashlib.sha256()
    root = Path(pjengine.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
