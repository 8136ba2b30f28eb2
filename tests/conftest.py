"""JAX runs on the CPU unless JAX_PLATFORMS says otherwise; tests marked `gpu` run only where it names a GPU.

On the CPU, programs are compiled without most of LLVM's optimizations: most tests run each for a moment, and compiling
takes half the time. Not for real models, whose steps would take twice as long, and not in processes that tests start.
"""

from __future__ import annotations

import os
import signal

import pytest

# Before anything imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Who starts the tests behind a shell's `&` has them ignore it, and tests of interrupts wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

ON_GPU = bool({"cuda", "gpu"} & set(os.environ["JAX_PLATFORMS"].split(",")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files first, so that of several workers none is left with one when the others are done.
    real = {item.path for item in items if item.get_closest_marker("real")}
    items.sort(key=lambda item: item.path not in real)
    if ON_GPU:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU: run with JAX_PLATFORMS=cuda")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)  # before fixtures of any scope
def pytest_runtest_setup(item: pytest.Item) -> None:
    if ON_GPU:
        return
    import jax  # it reads JAX_PLATFORMS

    jax.config.update("jax_disable_most_optimizations", item.get_closest_marker("real") is None)
