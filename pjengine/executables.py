"""Compiling ahead of time: one executable per static shape, several at once, remembered on disk."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import jax
from tqdm import tqdm

from pjengine.models.embedded import cache_directory

K = TypeVar("K", bound=Hashable)

logger = logging.getLogger(__name__)

_COMPILE_STACK = 64 << 20  # bytes; XLA recurses deeply over unrolled layers


def use_compile_cache(directory: str | None) -> None:
    """Points JAX's persistent compilation cache at a directory, unless the program has chosen one already.

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


def compile_all(lowerings: Mapping[K, Callable[[], Any]], what: str, progress: bool = True) -> dict[K, Any]:
    """Compiles every entry; tracing stays on this thread, XLA works in others.

    Args:
      lowerings: key -> function that returns a `jax.stages.Lowered`.
      what: names the work in the progress bar.
    Returns: key -> `jax.stages.Compiled`.
    """
    started = time.monotonic()
    old = threading.stack_size(_COMPILE_STACK)
    try:
        pool = ThreadPoolExecutor(max(1, min(len(lowerings), os.cpu_count() or 1)), thread_name_prefix="compile")
        with pool, tqdm(total=len(lowerings), desc=f"Compiling {what}", disable=not progress, leave=False) as bar:
            futures = {pool.submit(lower().compile): key for key, lower in lowerings.items()}
            compiled = {}
            for future in as_completed(futures):
                compiled[futures[future]] = future.result()
                bar.update()
    finally:
        threading.stack_size(old)
    logger.info("compiled %d %s in %.1f s", len(lowerings), what, time.monotonic() - started)
    return compiled
