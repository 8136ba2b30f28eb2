"""What Mosaic asks CUDA's assembler."""

from __future__ import annotations

import functools

from jax.experimental.mosaic.gpu import fragmented_array

_VERSION = "_get_ptxas_isa_version"


def remember_version() -> None:
    """Asks the assembler for its version once a process.

    JAX (0.10 to 0.11) starts `ptxas --version` whenever it lowers a conversion to or from a narrow type, each `pl.when`
    among them: 120 to 145 processes a forward step, 4 to 10 ms each, half of the time that lowering it takes.
    """
    library = getattr(fragmented_array, "mgpu_lib", None)  # None where JAX has no CUDA plugin
    extension = getattr(library, "_mosaic_gpu_ext", None)
    ask = getattr(extension, _VERSION, None)
    if ask is not None and not hasattr(ask, "cache_info"):
        setattr(extension, _VERSION, functools.cache(ask))
