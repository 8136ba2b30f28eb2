"""SwiGLU of sums in registers."""

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
from pjengine.pallas_kernels.persistent_product.products import LAYOUT
from pjengine.pallas_kernels.registers import approximate, float32, int32


def swiglu_halves(sums: jax.Array) -> jax.Array:
    """silu(gate) * up, [64, n], of sums [64, 2 * n]: gate and up side by side, float32."""
    rows, columns = sums.shape
    result = plgpu.ShapeDtypeStruct((rows, columns // 2), jnp.float32, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=result)
    def compute(ctx: Any, sums: Any) -> Any:
        gate, up = sums[:, : columns // 2], sums[:, columns // 2 :]
        registers = np.empty_like(gate.registers)
        for place, pair in np.ndenumerate(gate.registers):
            registers[place] = _swiglu_pair(pair, up.registers[place])
        return mgpu.FragmentedArray(_registers=registers, _layout=gate.layout, _is_signed=None)

    return compute(sums)


def _swiglu_pair(gate: Any, up: Any) -> Any:
    """silu(gate) * up of vectors of float32. exp(-gate) may be infinite: the result is 0 then, as it should be."""
    result = llvm.mlir_undef(gate.type)
    for i in range(ir.VectorType(gate.type).shape[0]):
        place = int32(i).value
        g, u = llvm.extractelement(gate, place), llvm.extractelement(up, place)
        denominator = arith.addf(approximate("ex2", arith.mulf(g, float32(-LOG2E))), float32(1.0))
        value = arith.mulf(arith.mulf(g, u), approximate("rcp", denominator))
        result = llvm.insertelement(result, value, place)
    return result
