"""Executables, one per static shape, and where they are kept for the next start."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import pickle
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import pjengine
from pjengine.errors import ConfigError
from pjengine.models.embedded import cache_directory
from pjengine.pallas_kernels.backends import current_target, load_runtime

logger = logging.getLogger(__name__)


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


class Executables(Protocol):
    """Executables by key, as a `Compilation` has them."""

    @property
    def finished(self) -> bool: ...
    def get(self, key: Hashable) -> Executable | None: ...
    def __getitem__(self, key: Hashable) -> Executable: ...
    def wait(self) -> None:
        """Until all of them are ready."""
        ...

    def cancel(self) -> None:
        """Starts nothing more."""
        ...


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
            source_digest(Path(pjengine.__file__).parent),
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

    Raises: ConfigError if a directory was named that cannot be made.
    """
    if directory == "" or jax.default_backend() == "cpu":
        return ExecutableStore(None, setting)
    path = _make_directory(directory, "executables", mode=0o700)
    if path is None:
        return ExecutableStore(None, setting)
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
    Raises: ConfigError if a directory was named that cannot be made.
    """
    if directory == "" or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    path = _make_directory(directory)
    if path is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _make_directory(directory: str | None, below: str = "", mode: int = 0o777) -> Path | None:
    """The directory of the compile cache, or one below it; None: the default one cannot be made.

    Raises: ConfigError if it was named.
    """
    path = (Path(directory) if directory else cache_directory() / "compiled") / below
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        if directory:
            raise ConfigError(f"compile_cache: {path} cannot be made ({error.strerror}); name another") from error
        logger.warning(
            "compile_cache: %s cannot be made (%s), so the next start compiles again; name another",
            path,
            error.strerror,
        )
        return None
    return path


def source_digest(package: Path) -> str:
    """Of a package's Python files and tables (of block sizes): any change of them makes other executables."""
    digest = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.json")]):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
