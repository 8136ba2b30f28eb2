"""Random layers of a post-norm encoder, and random rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def random_rows(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def random_layers(count: int, hidden: int) -> list[dict[str, jax.Array]]:
    """Weights of such a size that every part of a layer changes its result; bfloat16."""

    @jax.jit
    def layer(key: jax.Array) -> dict[str, jax.Array]:
        keys = iter(jax.random.split(key, 12))

        def normal(scale: float, *shape: int, around: float = 0.0) -> jax.Array:
            return (around + jax.random.normal(next(keys), shape) * scale).astype(jnp.bfloat16)

        linears = {
            name: (normal(rows**-0.5, rows, columns), normal(0.3, columns))
            for name, rows, columns in (
                ("qkv", hidden, 3 * hidden),
                ("o", hidden, hidden),
                ("up", hidden, 4 * hidden),
                ("down", 4 * hidden, hidden),
            )
        }
        norms = {name: (normal(0.1, hidden, around=1), normal(0.1, hidden)) for name in ("attn_norm", "mlp_norm")}
        both = {**linears, **norms}
        return {name: pair[0] for name, pair in both.items()} | {f"{name}_bias": pair[1] for name, pair in both.items()}

    return [layer(jax.random.fold_in(jax.random.key(1), i)) for i in range(count)]
