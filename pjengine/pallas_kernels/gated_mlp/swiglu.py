"""SwiGLU of two accumulators, in registers."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pjengine.pallas_kernels.mosaic_common import LOG2E


def swiglu_tile(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up of float32 tiles in the wgmma accumulator layout: an exponential and a reciprocal per element."""
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(gate.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=result)
    def compute(ctx: Any, gate: Any, up: Any) -> Any:
        registers = np.empty_like(gate.registers)
        for place, pair in np.ndenumerate(gate.registers):
            registers[place] = _swiglu_pair(pair, up.registers[place])
        return mgpu.FragmentedArray(_registers=registers, _layout=gate.layout, _is_signed=None)

    return compute(gate, up)


def fence_accumulators() -> None:
    """From here on wgmma may touch the accumulators. Without it the assembler puts a fence of its own into the loop."""

    @plgpu.inline_mgpu()
    def fence(ctx: Any) -> None:
        nvvm.wgmma_fence_aligned()

    fence()


def _swiglu_pair(gate: Any, up: Any) -> Any:
    """silu(gate) * up of vectors of float32. exp(-gate) may be infinite: the result is 0 then, as it should be."""
    result = llvm.mlir_undef(gate.type)
    for i in range(ir.VectorType(gate.type).shape[0]):
        place = arith.constant(ir.IntegerType.get_signless(32), i)
        g, u = llvm.extractelement(gate, place), llvm.extractelement(up, place)
        denominator = arith.addf(_approximate("ex2", arith.mulf(g, _constant(-LOG2E))), _constant(1.0))
        value = arith.mulf(arith.mulf(g, u), _approximate("rcp", denominator))
        result = llvm.insertelement(result, value, place)
    return result


def _constant(value: float) -> Any:
    return arith.constant(ir.F32Type.get(), value)


def _approximate(function: str, x: Any) -> Any:
    """The hardware's ex2 or rcp of a float32: 2 ulp, subnormals are 0."""
    return llvm.inline_asm(ir.F32Type.get(), [x], f"{function}.approx.ftz.f32 $0, $1;", "=f,f", has_side_effects=False)
