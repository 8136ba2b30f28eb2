"""Mosaic kernels are found in lowered programs, each once, as they are: their digest is what finds them compiled."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from jax.experimental.mosaic.gpu import fragmented_array

from pjengine.pallas_kernels import rope_write_kv
from pjengine.pallas_kernels.assembler import remember_version
from pjengine.pallas_kernels.kernel_programs import Kernel, kernels_of
from tests.kernels.hopper import lowered_for_hopper


def kernels_of_writes(*heads: int) -> list[Kernel]:
    """Of a program that writes to three caches of each number of heads."""

    def write(slots: Any, *arrays: Any) -> Any:
        return [
            rope_write_kv(new, new, new, None, None, pages, pages + 1, slots, backend="mosaic")
            for new, pages in zip(arrays[::2], arrays[1::2], strict=True)
        ]

    arrays = [shape for h in heads for shape in (((8, h, 128), "bfloat16"), ((30, h, 64, 128), "bfloat16"))]
    return kernels_of(lowered_for_hopper(write, ((8,), "int32"), *(arrays * 3)))


def test_each_kernel_is_found_once() -> None:
    (one,) = kernels_of_writes(8)
    assert hashlib.sha256(bytes(one.attributes["module"])).digest() == one.digest
    assert one.attributes["use_custom_barrier"] is False
    both = kernels_of_writes(8, 4)
    assert len(both) == 2
    assert one in both


def test_a_program_without_kernels_has_none() -> None:
    assert kernels_of(lowered_for_hopper(lambda x: x + 1, ((8,), "float32"))) == []


def test_the_assembler_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Extension:
        @staticmethod
        def _get_ptxas_isa_version() -> int:
            asked.append(1)
            return 90

    class Library:
        _mosaic_gpu_ext = Extension

    monkeypatch.setattr(fragmented_array, "mgpu_lib", Library)
    for _ in range(3):
        remember_version()
        assert Extension._get_ptxas_isa_version() == 90
    assert len(asked) == 1


def test_without_a_plugin_there_is_no_assembler_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragmented_array, "mgpu_lib", None)
    remember_version()
