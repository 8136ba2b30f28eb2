"""`apply_rope` and `rope_write_kv`'s reference: rotation, slots, quantisation, donation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels import apply_rope, rms_norm, rope_write_kv, rope_write_kv_qkv
from tests.kernels.hopper import on_hopper

PAGES, KV_HEADS, PAGE, DIM = 5, 2, 4, 8


def inputs(tokens: int = 6, heads: int = 6, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal((tokens, n, DIM)), jnp.float32) for n in (heads, KV_HEADS, KV_HEADS))
    angles = rng.uniform(0, 6, (tokens, DIM // 2))
    return q, k, v, jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def pools(dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    k_pages, v_pages = (jnp.full((PAGES, KV_HEADS, PAGE, DIM), x, dtype) for x in (-1, -2))
    return k_pages, v_pages


def test_rope_is_a_rotation_of_pairs() -> None:
    q, _, _, cos, sin = inputs()
    halves = np.asarray(q)[..., : DIM // 2] + 1j * np.asarray(q)[..., DIM // 2 :]
    turned = halves * (np.asarray(cos) + 1j * np.asarray(sin))[:, None]
    np.testing.assert_allclose(
        apply_rope(q, cos, sin), np.concatenate([turned.real, turned.imag], -1), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="cos, sin"):
        apply_rope(q, cos[:, :2], sin[:, :2])


def test_writes_only_the_given_slots() -> None:
    q, k, v, cos, sin = inputs()
    slots = jnp.array([4, 11, -1, 19, 13, -7], jnp.int32)
    rotated, k_pages, v_pages = rope_write_kv(q, k, v, cos, sin, *pools(), slots)
    expected_k, expected_v = (np.array(p) for p in pools())
    for token, slot in enumerate(np.asarray(slots)):
        if slot >= 0:
            expected_k[slot // PAGE, :, slot % PAGE] = apply_rope(k, cos, sin)[token]
            expected_v[slot // PAGE, :, slot % PAGE] = v[token]
    np.testing.assert_array_equal(k_pages, expected_k)
    np.testing.assert_array_equal(v_pages, expected_v)
    np.testing.assert_array_equal(rotated, apply_rope(q, cos, sin))


def test_without_angles_nothing_is_rotated() -> None:
    q, k, v, cos, _ = inputs()
    slots = jnp.arange(4, 10, dtype=jnp.int32)
    same, k_pages, _ = rope_write_kv(q, k, v, None, None, *pools(), slots)
    np.testing.assert_array_equal(same, q)
    np.testing.assert_array_equal(k_pages[1, :, 0], k[0])
    with pytest.raises(ValueError, match="both or neither"):
        rope_write_kv(q, k, v, cos, None, *pools(), slots)


@pytest.mark.parametrize("scale", [0.5, np.array([0.5, 0.125], np.float32)])
def test_fp8_is_scaled_and_clipped(scale: Any) -> None:
    q, k, v, cos, sin = inputs()
    v = v.at[0, 0, 0].set(1e6).at[0, 0, 1].set(-1e6)
    slots = jnp.arange(4, 10, dtype=jnp.int32)
    _, k_pages, v_pages = rope_write_kv(
        q, k, v, cos, sin, *pools(jnp.float8_e4m3fn), slots, k_scale=jnp.asarray(scale), v_scale=jnp.asarray(scale)
    )
    stored = np.asarray(k_pages.astype(jnp.float32))[1, :, 0] * np.broadcast_to(scale, (KV_HEADS,))[:, None]
    np.testing.assert_allclose(stored, apply_rope(k, cos, sin)[0], rtol=0.07, atol=0.01)
    assert v_pages[1, 0, 0, 0] == 448
    assert v_pages[1, 0, 0, 1] == -448


def test_donated_pools_are_updated_in_place() -> None:
    q, k, v, cos, sin = inputs()
    write = jax.jit(rope_write_kv, donate_argnums=(5, 6))
    args = (q, k, v, cos, sin, *pools(), jnp.arange(4, 10, dtype=jnp.int32))
    memory: Any = write.lower(*args).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 2 * args[5].nbytes
    assert memory.temp_size_in_bytes < args[5].nbytes + 4096


def test_contradicting_arguments_are_refused() -> None:
    q, k, v, cos, sin = inputs()
    slots = jnp.arange(6, dtype=jnp.int32)
    with pytest.raises(ValueError, match="write_slots"):
        rope_write_kv(q, k, v, cos, sin, *pools(), slots[:3])
    with pytest.raises(ValueError, match="k, v"):
        rope_write_kv(q, k[:3], v, cos, sin, *pools(), slots)
    with pytest.raises(ValueError, match="k_pages"):
        rope_write_kv(q, k, v, cos, sin, pools()[0][:, :1], pools()[1][:, :1], slots)


@pytest.mark.parametrize("backend", ["mosaic", "reference"])
def test_angles_that_do_not_fit_are_refused_by_every_backend(backend: str) -> None:
    """A kernel would read beyond them."""

    def write(*arrays: Any) -> Any:
        return rope_write_kv_qkv(*arrays, backend=backend)

    pages = jax.ShapeDtypeStruct((9, 2, 16, 64), jnp.bfloat16)
    qkv, slots = jax.ShapeDtypeStruct((6, 8, 64), jnp.bfloat16), jax.ShapeDtypeStruct((6,), jnp.int32)
    for shape in ((6, 16), (5, 32)):
        angles = jax.ShapeDtypeStruct(shape, jnp.float32)
        with on_hopper(), pytest.raises(ValueError, match=r"cos, sin: expected \[6, 32\]"):
            jax.eval_shape(write, qkv, angles, angles, pages, pages, slots)


@pytest.mark.parametrize("rotated", [True, False])
def test_a_fused_projection_gives_what_its_parts_give(rotated: bool) -> None:
    q, k, v, *angles = inputs()
    cos, sin = angles if rotated else (None, None)
    slots = jnp.array([4, 11, -1, 19, 13, -7], jnp.int32)
    expected = rope_write_kv(q, k, v, cos, sin, *pools(), slots)
    actual = rope_write_kv_qkv(jnp.concatenate([q, k, v], axis=1), cos, sin, *pools(), slots)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rotated", [True, False])
def test_norms_come_before_the_rotation(rotated: bool) -> None:
    q, k, v, *angles = inputs()
    cos, sin = angles if rotated else (None, None)
    slots = jnp.array([4, 11, -1, 19, 13, -7], jnp.int32)
    weights = [jnp.asarray(np.random.default_rng(i).uniform(0.5, 2, DIM), jnp.float32) for i in range(2)]
    normed_q, normed_k = (rms_norm(x, weight, 0.01) for x, weight in zip((q, k), weights, strict=True))
    expected = rope_write_kv(normed_q, normed_k, v, cos, sin, *pools(), slots)
    qkv = jnp.concatenate([q, k, v], axis=1)
    actual = rope_write_kv_qkv(qkv, cos, sin, *pools(), slots, q_norm=weights[0], k_norm=weights[1], eps=0.01)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_norms_that_do_not_fit_are_refused() -> None:
    q, k, v, cos, sin = inputs()
    qkv, slots = jnp.concatenate([q, k, v], axis=1), jnp.arange(4, 10, dtype=jnp.int32)
    with pytest.raises(ValueError, match="q_norm, k_norm: expected both or neither"):
        rope_write_kv_qkv(qkv, cos, sin, *pools(), slots, k_norm=jnp.ones(DIM))
    with pytest.raises(ValueError, match=r"q_norm: expected float32 \[8\], got float32 \[6\]"):
        rope_write_kv_qkv(qkv, cos, sin, *pools(), slots, q_norm=jnp.ones(6), k_norm=jnp.ones(6))


def test_wrong_shapes_of_a_fused_projection() -> None:
    q, k, v, cos, sin = inputs()
    qkv, slots = jnp.concatenate([q, k, v], axis=1), jnp.arange(4, 10, dtype=jnp.int32)
    with pytest.raises(ValueError, match=r"qkv: expected \[T, heads \+ 2 \* 2, head_dim\], got \(6, 4, 8\)"):
        rope_write_kv_qkv(qkv[:, :4], cos, sin, *pools(), slots)
    with pytest.raises(ValueError, match="k_pages, v_pages"):
        rope_write_kv_qkv(qkv[..., :4], cos[:, :2], sin[:, :2], *pools(), slots)
    with pytest.raises(ValueError, match="write_slots"):
        rope_write_kv_qkv(qkv, cos, sin, *pools(), slots[:3])
