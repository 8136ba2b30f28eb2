"""SwiGLU of two float32 accumulators, in registers."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pjengine.pallas_kernels.mosaic_common import LOG2E

_LARGEST = 60.0  # exponents are cut off here: the product of two denominators stays finite


def swiglu_tile(gate: jax.Array, up: jax.Array, method: str) -> jax.Array:
    """silu(gate) * up of float32 tiles in the wgmma accumulator layout."""
    result = plgpu.ShapeDtypeStruct(gate.shape, jnp.float32, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA), return_type=result)
    def compute(ctx: Any, gate: Any, up: Any) -> Any:
        registers = np.empty_like(gate.registers)
        for place, register in np.ndenumerate(gate.registers):
            g, u = _elements(register), _elements(up.registers[place])
            registers[place] = _pack(register.type, METHODS[method](g, u))
        return mgpu.FragmentedArray(_registers=registers, _layout=gate.layout, _is_signed=None)

    return compute(gate, up)


def _elements(register: Any) -> list[Any]:
    return [llvm.extractelement(register, _index(i)) for i in range(ir.VectorType(register.type).shape[0])]


def _pack(kind: Any, values: list[Any]) -> Any:
    result = llvm.mlir_undef(kind)
    for i, value in enumerate(values):
        result = llvm.insertelement(result, value, _index(i))
    return result


def _index(i: int) -> Any:
    return arith.constant(ir.IntegerType.get_signless(32), i)


def _constant(value: float) -> Any:
    return arith.constant(ir.F32Type.get(), value)


def _fast(name: str, x: Any) -> Any:
    return llvm.inline_asm(ir.F32Type.get(), [x], f"{name}.f32 $0, $1;", "=f,f", has_side_effects=False)


def _plain(gate: list[Any], up: list[Any]) -> list[Any]:
    """gate * up / (1 + exp(-gate)): an exponential and a reciprocal per element."""
    result = []
    for g, u in zip(gate, up, strict=True):
        denominator = arith.addf(_fast("ex2.approx.ftz", arith.mulf(g, _constant(-LOG2E))), _constant(1.0))
        result.append(arith.mulf(arith.mulf(g, u), _fast("rcp.approx.ftz", denominator)))
    return result


def _shared(gate: list[Any], up: list[Any]) -> list[Any]:
    """As `_plain`, with one reciprocal for two elements."""
    a, b = (
        arith.addf(
            _fast("ex2.approx.ftz", arith.minimumf(arith.mulf(g, _constant(-LOG2E)), _constant(_LARGEST))),
            _constant(1.0),
        )
        for g in gate
    )
    inverse = _fast("rcp.approx.ftz", arith.mulf(a, b))
    return [
        arith.mulf(arith.mulf(g, u), arith.mulf(inverse, other)) for g, u, other in zip(gate, up, (b, a), strict=True)
    ]


def _tanh(gate: list[Any], up: list[Any]) -> list[Any]:
    result = []
    for g, u in zip(gate, up, strict=True):
        half = arith.mulf(g, _constant(0.5))
        turned = _fast("tanh.approx", half)
        result.append(arith.mulf(arith.addf(half, arith.mulf(half, turned)), u))
    return result


METHODS = {"plain": _plain, "shared": _shared, "tanh": _tanh}
