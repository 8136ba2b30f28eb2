"""Every Mosaic kernel lowers for a Hopper GPU, on the CPU: the tier between the references and the GPU itself."""

from __future__ import annotations

from typing import Any

import pytest

from pjengine.errors import KernelUnavailable
from pjengine.pallas_kernels import (
    encoder_stack,
    packed_attention,
    packed_attention_qkv,
    paged_attention,
    rope_write_kv,
    rope_write_kv_qkv,
)
from pjengine.pallas_kernels.encoder_stack.packing import PackedLayers
from tests.kernels.hopper import lower_for_hopper

# heads, kv_heads, head_dim, page_size
SHAPES = [(32, 8, 128, 64), (9, 3, 64, 16), (14, 2, 64, 128), (16, 1, 128, 32)]


def lower_paged(
    shape: tuple[int, int, int, int],
    tokens: int,
    rows: int,
    *,
    layers: int = 1,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    sinks: bool = False,
    kv_scales: bool = False,
    **options: Any,
) -> str:
    heads, kv_heads, head_dim, page_size = shape

    def layer_stack(q: Any, k: Any, v: Any, starts: Any, lens: Any, tables: Any, sink: Any, scale: Any) -> Any:
        if sinks:
            options["sinks"] = sink
        if kv_scales:
            options["k_scale"] = options["v_scale"] = scale
        for _ in range(layers):
            q = paged_attention(q, k, v, starts, lens, tables, scale=0.1, backend="mosaic", **options)
        return q

    pages = (40, kv_heads, page_size, head_dim)
    kv_dtype = kv_dtype or dtype
    return lower_for_hopper(
        layer_stack,
        ((tokens, heads, head_dim), dtype),
        (pages, kv_dtype),
        (pages, kv_dtype),
        ((rows + 1,), "int32"),
        ((rows,), "int32"),
        ((rows, 10), "int32"),
        ((heads,), dtype),
        ((kv_heads,), "float32"),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decode", [True, False])
def test_paged_attention(shape: tuple[int, int, int, int], decode: bool) -> None:
    text = lower_paged(shape, 8 if decode else 200, 8, decode=decode)
    assert text.count("@mosaic_gpu_v2") == (1 if decode else 2)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("decode", [True, False])
def test_paged_head_dims_and_caches(head_dim: int, kv_dtype: str, decode: bool) -> None:
    fp8 = kv_dtype != "bfloat16"
    text = lower_paged((14, 2, head_dim, 32), 8, 8, decode=decode, kv_dtype=kv_dtype, kv_scales=fp8, sinks=not fp8)
    assert "@mosaic_gpu_v2" in text


@pytest.mark.parametrize("options", [{"window": 100}, {"chunk": 128}, {"soft_cap": 30.0}, {"dtype": "float16"}])
@pytest.mark.parametrize("decode", [True, False])
def test_paged_options(options: dict[str, Any], decode: bool) -> None:
    assert "@mosaic_gpu_v2" in lower_paged(SHAPES[0], 8, 8, decode=decode, **options)


def test_layers_share_one_kernel() -> None:
    """Compiling each layer's kernel anew would cost about a second a layer and bucket."""
    few, many = (lower_paged(SHAPES[0], 64, 8, layers=n) for n in (2, 12))
    assert many.count("@mosaic_gpu_v2") == few.count("@mosaic_gpu_v2")


# BGE and GTE, MiniLM, Qwen3-Embedding
PACKED_SHAPES = [(16, 16, 64), (12, 12, 32), (16, 8, 128)]


def lower_packed(
    heads: int, kv_heads: int, head_dim: int, tokens: int, rows: int, *, dtype: str = "bfloat16", **options: Any
) -> str:
    return lower_for_hopper(
        lambda qkv, starts: packed_attention_qkv(
            qkv, starts, kv_heads=kv_heads, scale=0.1, backend="mosaic", **options
        ),
        ((tokens, heads + 2 * kv_heads, head_dim), dtype),
        ((rows + 1,), "int32"),
    )


@pytest.mark.parametrize("shape", PACKED_SHAPES)
@pytest.mark.parametrize(("tokens", "rows", "kernel"), [(512, 64, "short"), (1000, 2, "long")])
def test_packed_attention(shape: tuple[int, int, int], tokens: int, rows: int, kernel: str) -> None:
    text = lower_packed(*shape, tokens, rows)
    assert text.count("@mosaic_gpu_v2") == 1
    assert f"packed_attention_{kernel}" in text
    assert "stablehlo.while" not in text, "loops on the device split its CUDA graph"


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window": 65}, {"causal": True, "window": 9}, {"soft_cap": 30.0}, {"dtype": "float16"}],
)
def test_packed_options(options: dict[str, Any]) -> None:
    for tokens, rows in ((512, 64), (1000, 2)):
        assert "@mosaic_gpu_v2" in lower_packed(16, 8, 64, tokens, rows, **options)


def test_packed_attention_of_arrays_apart() -> None:
    text = lower_for_hopper(
        lambda q, k, v, starts: packed_attention(q, k, v, starts, scale=0.1, backend="mosaic"),
        ((516, 8, 64), "bfloat16"),
        *[((516, 2, 64), "bfloat16")] * 2,
        ((65,), "int32"),
    )
    assert "@mosaic_gpu_v2" in text


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("tokens", [1, 5000])
def test_kv_write_is_in_place(tokens: int, kv_dtype: str) -> None:
    pages = (30, 8, 64, 128)
    text = lower_for_hopper(
        lambda q, k, v, cos, sin, k_pages, v_pages, slots: rope_write_kv(
            q, k, v, cos, sin, k_pages, v_pages, slots, backend="mosaic"
        ),
        ((tokens, 32, 128), "bfloat16"),
        *[((tokens, 8, 128), "bfloat16")] * 2,
        *[((tokens, 64), "float32")] * 2,
        *[(pages, kv_dtype)] * 2,
        ((tokens,), "int32"),
        donate_argnums=(5, 6),
    )
    (call,) = (line for line in text.splitlines() if "@mosaic_gpu_v2" in line)
    assert call.count("output_operand_alias<") == 2
    assert text.count("tf.aliasing_output") == 2


@pytest.mark.parametrize(
    ("shape", "dtype", "kv_dtype", "norm", "fused"),
    [
        ((32, 8, 128), "bfloat16", "bfloat16", False, True),
        ((8, 4, 256), "float16", "float16", False, True),
        ((32, 8, 80), "bfloat16", "bfloat16", False, True),
        ((16, 8, 128), "bfloat16", "bfloat16", True, True),
        ((14, 2, 64), "float16", "float16", True, True),
        ((32, 8, 128), "bfloat16", "float8_e4m3fn", False, False),  # XLA rotates and narrows
        ((16, 8, 128), "bfloat16", "float8_e4m3fn", True, False),
        ((9, 3, 64), "float32", "float32", False, False),
        ((16, 8, 40), "bfloat16", "bfloat16", False, False),
        ((32, 8, 80), "bfloat16", "bfloat16", True, False),  # five threads a head: their squares are no shuffles' sum
    ],
)
def test_kv_write_of_a_fused_projection_is_one_launch(
    shape: tuple[int, int, int], dtype: str, kv_dtype: str, norm: bool, fused: bool
) -> None:
    heads, kv_heads, head_dim = shape

    def write(qkv: Any, cos: Any, sin: Any, k_pages: Any, v_pages: Any, slots: Any, weight: Any) -> Any:
        norms = {"q_norm": weight, "k_norm": weight} if norm else {}
        return rope_write_kv_qkv(qkv, cos, sin, k_pages, v_pages, slots, backend="mosaic", **norms)

    for tokens in (1, 5000):
        text = lower_for_hopper(
            write,
            ((tokens, heads + 2 * kv_heads, head_dim), dtype),
            *[((tokens, head_dim // 2), "float32")] * 2,
            *[((30, kv_heads, 64, head_dim), kv_dtype)] * 2,
            ((tokens,), "int32"),
            ((head_dim,), dtype),
            donate_argnums=(3, 4),
        )
        (call,) = (line for line in text.splitlines() if "@mosaic_gpu_v2" in line)
        assert ("stablehlo.multiply" in text) != fused
        assert call.count("output_operand_alias<") == 2
        assert text.count("tf.aliasing_output") == 2


def test_refusals_name_the_reason() -> None:
    with pytest.raises(KernelUnavailable, match="head_dim must be 32, 64 or 128, got 80"):
        lower_packed(4, 4, 80, 512, 64)
    with pytest.raises(KernelUnavailable, match="tensor cores take bfloat16 and float16, got float32"):
        lower_packed(4, 4, 64, 512, 64, dtype="float32")
    with pytest.raises(KernelUnavailable, match="head_dim must be 64, 80, 96, 128 or 256, got 72"):
        lower_paged((8, 8, 72, 16), 8, 8)
    with pytest.raises(KernelUnavailable, match="q's dtype or be float8_e4m3fn, got bfloat16 and float16"):
        lower_paged(SHAPES[0], 8, 8, kv_dtype="float16")
    with pytest.raises(KernelUnavailable, match="at most 16 query heads per KV head, got 32"):
        lower_paged((32, 1, 64, 16), 8, 8)
    with pytest.raises(KernelUnavailable, match="tensor cores take bfloat16 and float16, got float32"):
        lower_paged(SHAPES[0], 8, 8, dtype="float32")
    with pytest.raises(KernelUnavailable, match="no multiple of 128 bytes"):
        lower_for_hopper(
            lambda q, k, v, k_pages, v_pages, slots: rope_write_kv(
                q, k, v, None, None, k_pages, v_pages, slots, backend="mosaic"
            ),
            ((4, 9, 64), "bfloat16"),
            *[((4, 3, 64), "bfloat16")] * 2,
            *[((9, 3, 16, 64), "float8_e4m3fn")] * 2,
            ((4,), "int32"),
        )


@pytest.mark.parametrize(("rows", "kernels"), [(1, 1), (8, 2)])
def test_one_row_alone_is_one_kernel(rows: int, kernels: int) -> None:
    """Several rows may be prompts and decoding ones, which have a kernel each."""
    text = lower_paged(SHAPES[0], 256, rows)
    assert text.count("custom_call @mosaic_gpu") == kernels


@pytest.mark.parametrize(("hidden", "heads"), [(1024, 16), (384, 12)])
def test_encoder_stack(hidden: int, heads: int) -> None:
    """One kernel, however many layers."""

    def stack(x: Any, starts: Any, weights: Any, biases: Any, norms: Any, counter: Any) -> Any:
        return encoder_stack(x, starts, PackedLayers(weights, biases, norms, counter, heads), eps=1e-12)

    layers = 3
    text = lower_for_hopper(
        stack,
        ((16, hidden), "bfloat16"),
        ((9,), "int32"),
        ((layers, hidden // 8, 12, 8 * hidden), "bfloat16"),
        ((layers, 9 * hidden), "bfloat16"),
        ((layers, 4, hidden), "bfloat16"),
        ((1,), "int32"),
    )
    assert text.count("custom_call @mosaic_gpu") == 1
