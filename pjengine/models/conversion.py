"""`pjengine convert SRC DST`: any model source to an Orbax directory, which starts faster and restores sharded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from pjengine.models.loading import checkpoint_dtype, choose_dtype, load_source, model_of
from pjengine.models.orbax_files import check_destination, write
from pjengine.models.sources import resolve
from pjengine.models.tasks import head_of


def convert(
    src: str,
    dst: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    task: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Writes a model as an Orbax directory, with its config and tokenizer.

    Args:
      src: as `sources.resolve` takes it.
      dst: a directory that does not exist or is empty.
      dtype: of the weights written; "auto": the checkpoint's own, for GGUF float32 (dequantising is exact only there).
      task: what the result will be used for, as `tasks.head_of` takes it: it keeps the weights of that head.
      progress: called with a line of text before each stage.
    Returns: the directory.
    Raises:
      ModelError: the source cannot be read, or the destination is not free.
      ConfigError: an unknown dtype.
    """
    say = progress or (lambda _: None)
    destination = Path(dst).absolute()
    check_destination(destination)
    source = resolve(src)
    module, config = model_of(source)
    if dtype == "auto" and source.kind == "gguf":
        kept = jnp.dtype("float32")  # config.json goes on saying what to compute in
    else:
        kept = checkpoint_dtype(source) if dtype == "auto" else choose_dtype(source, dtype)
        source = dataclasses.replace(source, config={**source.config, "dtype": kept.name})
    say(f"reading {source.path} as {kept}")
    with jax.default_device(_host()):
        params = load_source(source, module, config, kept, head=head_of(source, module, config, task))
        say(f"writing {destination}")
        write(source, params, destination)
    return destination


def _host() -> jax.Device | None:
    """The CPU: a model need not fit on the accelerator. None, the default, where JAX_PLATFORMS leaves the CPU out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
