"""`rope_qkv`'s reference: rotation and norms of a fused projection, and what is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjengine.errors import KernelUnavailable
from pjengine.pallas_kernels import apply_rope, packed_attention, packed_attention_qkv, rms_norm, rope_qkv
from tests.kernels.hopper import lower_for_hopper


def inputs(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: Any = jnp.float32, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    qkv = jnp.asarray(rng.standard_normal((tokens, heads + 2 * kv_heads, head_dim)), dtype)
    angles = rng.uniform(0, 6, (tokens, head_dim // 2))
    norms = {f"{name}_norm": jnp.asarray(rng.uniform(0.5, 2, head_dim), dtype) for name in ("q", "k")}
    return qkv, jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32), norms


@settings(deadline=None, max_examples=12)
@given(
    tokens=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 8, 20]),
    norm=st.booleans(),
    eps=st.sampled_from([1e-6, 0.1]),
)
def test_against_float64(tokens: int, kv_heads: int, group: int, head_dim: int, norm: bool, eps: float) -> None:
    heads = group * kv_heads
    qkv, cos, sin, norms = inputs(tokens, heads, kv_heads, head_dim, seed=tokens)
    rotate = jax.jit(rope_qkv, static_argnames=("kv_heads", "eps"))
    actual = rotate(qkv, cos, sin, kv_heads=kv_heads, eps=eps, **(norms if norm else {}))
    expected = np.asarray(qkv, np.float64)
    turning = expected[:, : heads + kv_heads]
    if norm:
        turning /= np.sqrt((turning**2).mean(-1, keepdims=True) + eps)
        turning[:, :heads] *= norms["q_norm"]
        turning[:, heads:] *= norms["k_norm"]
    half = head_dim // 2
    turned = (turning[..., :half] + 1j * turning[..., half:]) * (np.asarray(cos) + 1j * np.asarray(sin))[:, None]
    expected[:, : heads + kv_heads] = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(actual[:, heads + kv_heads :], qkv[:, heads + kv_heads :])


def test_rounds_where_a_model_does() -> None:
    """To the projection's dtype after the norm and after the rotation."""
    qkv, cos, sin, norms = inputs(5, 4, 2, 64, jnp.bfloat16)
    q, k, v = jnp.split(qkv, (4, 6), axis=1)
    q, k = (apply_rope(rms_norm(x, w, 1e-6), cos, sin) for x, w in ((q, norms["q_norm"]), (k, norms["k_norm"])))
    np.testing.assert_array_equal(
        rope_qkv(qkv, cos, sin, kv_heads=2, **norms).astype(jnp.float32),
        jnp.concatenate([q, k, v], axis=1).astype(jnp.float32),
    )


def test_attention_of_the_result_and_its_gradient_are_those_of_its_parts() -> None:
    qkv, cos, sin, norms = inputs(7, 4, 2, 8)
    starts = jnp.array([0, 3, 7], jnp.int32)

    def fused(qkv: jax.Array) -> jax.Array:
        turned = rope_qkv(qkv, cos, sin, kv_heads=2, **norms)
        return packed_attention_qkv(turned, starts, kv_heads=2, scale=0.3, causal=True)

    def apart(qkv: jax.Array) -> jax.Array:
        q, k, v = jnp.split(qkv, (4, 6), axis=1)
        q, k = (apply_rope(rms_norm(x, norms[n], 1e-6), cos, sin) for x, n in ((q, "q_norm"), (k, "k_norm")))
        return packed_attention(q, k, v, starts, scale=0.3, causal=True)

    sums = (jax.jit(jax.value_and_grad(lambda x, f=f: jnp.square(f(x)).sum()))(qkv) for f in (fused, apart))
    for a, b in zip(*sums, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_contradicting_arguments_are_refused() -> None:
    qkv, cos, sin, norms = inputs(5, 4, 2, 8)
    with pytest.raises(ValueError, match=r"qkv: expected \[T, heads \+ 2 \* 3, head_dim\], got \(5, 8, 8\)"):
        rope_qkv(qkv, cos, sin, kv_heads=3)
    with pytest.raises(ValueError, match=r"cos, sin: expected \[5, 4\], got \(5, 3\)"):
        rope_qkv(qkv, cos[:, :3], sin[:, :3], kv_heads=2)
    with pytest.raises(ValueError, match="q_norm, k_norm: expected both or neither"):
        rope_qkv(qkv, cos, sin, kv_heads=2, q_norm=norms["q_norm"])
    with pytest.raises(ValueError, match=r"k_norm: expected float32 \[8\], got float32 \[4\]"):
        rope_qkv(qkv, cos, sin, kv_heads=2, q_norm=norms["q_norm"], k_norm=norms["k_norm"][:4])
    with pytest.raises(ValueError, match=r"q_norm: expected float32 \[8\], got bfloat16 \[8\]"):
        rope_qkv(qkv, cos, sin, kv_heads=2, **{name: w.astype(jnp.bfloat16) for name, w in norms.items()})


def lower(heads: int, kv_heads: int, head_dim: int, dtype: str, *, norm: bool, backend: str, tokens: int = 264) -> str:
    """A donated projection, rotated and attended to."""

    def attend(qkv: Any, cos: Any, sin: Any, weight: Any, starts: Any) -> Any:
        norms = {"q_norm": weight, "k_norm": weight} if norm else {}
        qkv = rope_qkv(qkv, cos, sin, kv_heads=kv_heads, backend=backend, **norms)
        return packed_attention_qkv(qkv, starts, kv_heads=kv_heads, scale=0.1, causal=True), qkv

    return lower_for_hopper(
        attend,
        ((tokens, heads + 2 * kv_heads, head_dim), dtype),
        *[((tokens, head_dim // 2), "float32")] * 2,
        ((head_dim,), dtype),
        ((4,), "int32"),
        donate_argnums=0,
    )


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((16, 8, 128), "bfloat16"), ((14, 2, 64), "float16"), ((12, 12, 32), "bfloat16")]
)
def test_rotates_in_place_in_one_launch(shape: tuple[int, int, int], dtype: str, norm: bool) -> None:
    for tokens in (8, 1000):
        text = lower(*shape, dtype, norm=norm, backend="auto", tokens=tokens)
        calls = [line for line in text.splitlines() if "@mosaic_gpu_v2" in line]
        assert len(calls) == 2  # the rotation and the attention
        assert calls[0].count("output_operand_alias<") == 1
        assert text.count("tf.aliasing_output") == 1
        projection = f"tensor<{tokens}x{shape[0] + 2 * shape[1]}x{shape[2]}x"
        readers = {line.split()[2] for line in text.splitlines() if " = stablehlo." in line and projection in line}
        assert readers <= {"stablehlo.custom_call", "stablehlo.pad"}  # padding by nothing, which XLA drops


@pytest.mark.parametrize(
    ("shape", "dtype", "backend"),
    [
        ((16, 8, 80), "bfloat16", "auto"),
        ((3, 1, 256), "bfloat16", "auto"),  # no packed kernel reads it where it lies
        ((16, 8, 128), "float32", "auto"),
        ((16, 8, 128), "bfloat16", "triton"),
        ((16, 8, 128), "bfloat16", "reference"),
    ],
)
def test_xla_does_the_rest(shape: tuple[int, int, int], dtype: str, backend: str) -> None:
    text = lower_for_hopper(
        lambda qkv, cos, sin: rope_qkv(qkv, cos, sin, kv_heads=shape[1], backend=backend),
        ((64, shape[0] + 2 * shape[1], shape[2]), dtype),
        *[((64, shape[2] // 2), "float32")] * 2,
    )
    assert "@mosaic_gpu_v2" not in text
    assert "stablehlo.multiply" in text


def test_refusals_name_the_reason() -> None:
    with pytest.raises(KernelUnavailable, match="no kernel reads a projection with heads of 80 where it lies"):
        lower(4, 4, 80, "bfloat16", norm=False, backend="mosaic")
    with pytest.raises(KernelUnavailable, match="elements must be of 16 bits, got float32"):
        lower(4, 4, 64, "float32", norm=False, backend="mosaic")
