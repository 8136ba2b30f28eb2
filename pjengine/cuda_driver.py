"""What CUDA's driver is asked for itself: a GPU's memory before JAX touches it, and short copies from there."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

_NON_BLOCKING = 1  # a stream that does not wait for the default one


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


class DeviceCopies:
    """Copies of small arrays from a GPU to the host.

    JAX's way to the host passes through threads of its runtime, which costs 0.2 ms from the end of a program
    (docs/decisions.md).

    Args:
      ordinal: of the GPU among those visible; JAX must have made its context, CUDA's primary one.
    Raises:
      OSError: there is no CUDA driver.
      RuntimeError: a call of it failed, as in `to_host`; the message has its name and CUDA's number of the error.
    """

    def __init__(self, ordinal: int):
        self._cuda = ctypes.CDLL("libcuda.so.1")
        device = ctypes.c_int()
        self._context, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
        self._check("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        with self:
            self._check("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(_NON_BLOCKING))

    def to_host(self, array: Any) -> np.ndarray:
        """The elements of a jax.Array that is on this GPU alone, in its shape and dtype.

        Waits for the program that computes it, and raises that program's error if it failed.
        """
        array.block_until_ready()
        host = np.empty(array.shape, array.dtype)
        source = ctypes.c_uint64(array.unsafe_buffer_pointer())
        with self:
            target, size = ctypes.c_void_p(host.ctypes.data), ctypes.c_size_t(host.nbytes)
            self._check("cuMemcpyDtoHAsync_v2", target, source, size, self._stream)
            self._check("cuStreamSynchronize", self._stream)
        return host

    def __enter__(self) -> None:
        """The calling thread, whichever it is, works in JAX's context."""
        self._check("cuCtxPushCurrent_v2", self._context)

    def __exit__(self, *_: object) -> None:
        self._check("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _check(self, function: str, *arguments: Any) -> None:
        if error := getattr(self._cuda, function)(*arguments):
            raise RuntimeError(f"{function}: CUDA error {error}")
