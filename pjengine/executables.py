"""Compiling ahead of time: one executable per static shape, several at once, kept on disk for the next start."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from tqdm import tqdm

import pjengine
from pjengine.models.embedded import cache_directory

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

_COMPILE_STACK = 64 << 20  # bytes; XLA recurses deeply over unrolled layers


class ExecutableStore:
    """Serialized executables of one program in one setting. Skips tracing, lowering and compiling on later starts.

    The files are pickles, which run code when read: a directory that others could write to is not used.
    """

    def __init__(self, directory: Path | None, setting: object):
        """directory: None: nothing is kept. setting: whatever changes the executables besides their keys."""
        self._directory = directory
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

    def load(self, what: str, key: object) -> Any:
        """The kept `jax.stages.Compiled`, or None."""
        path = self._path(what, key)
        if path is None or not path.is_file():
            return None
        try:
            return deserialize_and_load(*pickle.loads(path.read_bytes()))
        except Exception as error:  # whatever a truncated file or another driver may raise: compiling anew mends it
            logger.warning("%s cannot be loaded (%s); compiling it again", path, error)
            return None

    def keep(self, what: str, key: object, compiled: Any) -> None:
        path = self._path(what, key)
        if path is None:
            return
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        partial.write_bytes(pickle.dumps(serialize(compiled)))
        partial.rename(path)

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


def compile_all(
    lowerings: Mapping[K, Callable[[], Any]],
    what: str,
    store: ExecutableStore,
    progress: bool = True,
    options: Callable[[K], dict[str, Any]] = lambda key: {},
) -> dict[K, Any]:
    """Loads or compiles every entry; tracing stays on this thread, XLA works in others.

    Args:
      lowerings: key -> function that returns a `jax.stages.Lowered`.
      what: names the work in the progress bar and the store.
      options: key -> XLA's compiler options.
    Returns: key -> `jax.stages.Compiled`.
    """
    started = time.monotonic()
    compiled: dict[K, Any] = {}

    def compile_one(key: K, lowered: Any) -> Any:
        made = lowered.compile(compiler_options=options(key))
        store.keep(what, key, made)
        return made

    old = threading.stack_size(_COMPILE_STACK)
    try:
        pool = ThreadPoolExecutor(max(1, min(len(lowerings), os.cpu_count() or 1)), thread_name_prefix="compile")
        with pool, tqdm(total=len(lowerings), desc=f"Compiling {what}", disable=not progress, leave=False) as bar:
            loading = {pool.submit(store.load, what, key): key for key in lowerings}
            compiling: dict[Future[Any], K] = {}
            for future in as_completed(loading):
                key = loading[future]
                if (found := future.result()) is not None:
                    compiled[key] = found
                    bar.update()
            kept = len(compiled)
            for key, lower in lowerings.items():
                if key not in compiled:
                    compiling[pool.submit(compile_one, key, lower())] = key
            for future in as_completed(compiling):
                compiled[compiling[future]] = future.result()
                bar.update()
    finally:
        threading.stack_size(old)
    seconds = time.monotonic() - started
    message = "%s: %d loaded, %d compiled in %.1f s"
    logger.info(message, what, kept, len(compiled) - kept, seconds, extra={"phase": what})
    return compiled


def _source_digest() -> str:
    """Of every Python file of the package: any change of code makes other executables."""
    digest = hashlib.sha256()
    root = Path(pjengine.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
