"""JAX runs on the CPU unless JAX_PLATFORMS says otherwise; tests marked `gpu` run only where it names a GPU."""

from __future__ import annotations

import os

import pytest

# Before anything imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ON_GPU = bool({"cuda", "gpu"} & set(os.environ["JAX_PLATFORMS"].split(",")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_GPU:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU: run with JAX_PLATFORMS=cuda")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
