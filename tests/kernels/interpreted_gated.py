"""`gated_product` in JAX's interpreter against float32; `test_interpreted` runs it as a process of its own.

Clusters of one: the interpreter of JAX 0.10 knows no cluster barriers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.models.layers import swiglu
from pjengine.pallas_kernels.gated_mlp.mosaic import gated_product
from pjengine.pallas_kernels.persistent_product.tiles import ProductConfig
from tests.kernels.interpreted import interpreted
from tests.kernels.ragged_cases import relative_error


def check(tokens: int, hidden: int, mlp: int, *, sms: int, group: int = 4, warpgroups: int = 2) -> None:
    rng = np.random.default_rng(0)
    x, weight = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((tokens, hidden), (hidden, 2 * mlp))
    )
    with interpreted():
        config = ProductConfig(sms, cluster=1, warpgroups=warpgroups, stages=3, group=group)
        out = gated_product(x, weight, config=config)
        jax.block_until_ready(out)
    expected = swiglu(jnp.dot(x.astype(jnp.float32), weight.astype(jnp.float32), precision="highest"))
    error = relative_error(out.astype(jnp.float32), np.asarray(expected))
    if not error < 1e-2:
        raise AssertionError(f"{tokens} x {hidden} x {mlp}, {sms} SMs: relative error {error}")


if __name__ == "__main__":
    # Groups of two rows of tiles and of one, SMs with more tiles than others, more steps than stages.
    check(384, 256, 256, sms=4, group=2)
    check(128, 64, 128, sms=2)  # one step, one tile: an SM with nothing to do
    check(64, 256, 384, sms=2, warpgroups=1)
