"""What must be known of a GPU before JAX touches it, from CUDA's driver."""

from __future__ import annotations

import ctypes


def total_memory() -> int | None:
    """Bytes of the first visible GPU's memory; None: there is none. Makes no context on it."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, size = ctypes.c_int(), ctypes.c_size_t()
    failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
    failed = failed or cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    return None if failed else size.value
