"""Mosaic kernels compiled before the programs that hold them.

XLA and Mosaic want LLVM with different options, and LLVM's options are global to a process. So threads that compile
XLA's code share a lock, threads that compile Mosaic's kernels share it too, but never with the others, and whoever has
it lets more of its own kind in first. Programs with kernels that are compiled side by side wait for each other most of
the time. A kernel that the process has compiled already is found by its digest, without the lock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.mlir import ir

_TARGET = "mosaic_gpu_v2"
_DIGEST = "kernel_hash"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Mosaic kernel of a lowered program.

    Attributes:
      digest: by which it is found once it is compiled.
      attributes: of its custom call.
    """

    digest: bytes
    attributes: Mapping[str, bytes | bool] = dataclasses.field(repr=False)

    def compile(self) -> None:
        """Compiles the kernel alone, for all programs of this process.

        It is compiled when its call is made part of an executable, which looks at no operand: a program without any,
        never run, is enough.
        """
        call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct((1,), jnp.int32), has_side_effect=True)
        jax.jit(lambda: call(**self.attributes)).lower().compile()


def kernels_of(lowered: Any) -> list[Kernel]:
    """The different Mosaic kernels of a `jax.stages.Lowered`."""
    found: dict[bytes, Kernel] = {}

    def visit(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call":
            attributes = operation.attributes
            if attributes["call_target_name"].value == _TARGET and "mhlo.backend_config" in attributes:
                named = {entry.name: _value(entry.attr) for entry in attributes["mhlo.backend_config"]}
                digest = bytes(named[_DIGEST])
                found.setdefault(digest, Kernel(digest, named))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return list(found.values())


def _value(attribute: Any) -> bytes | bool:
    return bool(attribute.value) if isinstance(attribute, ir.BoolAttr) else bytes(attribute.value_bytes)
