"""Mosaic's products and norms lower for a Hopper GPU where they serve, and leave the rest to XLA; on the CPU."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import pytest

from pjengine.models.layers import attention_qkv, causal_attention_qkv, linear_swiglu
from pjengine.pallas_kernels import Projection, layer_norm, rms_norm
from pjengine.step_inputs import LayerCache, StepInputs
from tests.kernels.hopper import lower_for_hopper


def lower_gated(
    tokens: int,
    hidden: int,
    mlp: int,
    dtype: str = "bfloat16",
    *,
    layers: int = 1,
    bias: bool = False,
    backend: str = "auto",
) -> str:
    def products(x: Any, *weights: Any) -> Any:
        shift = jnp.ones(2 * mlp, dtype) if bias else None
        return [linear_swiglu(x, weight, shift, backend=backend) for weight in weights]

    return lower_for_hopper(products, ((tokens, hidden), dtype), *[((hidden, 2 * mlp), dtype)] * layers)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("tokens", "hidden", "mlp"),
    [
        (1024, 4096, 14336),
        (1288, 896, 4864),
        (4096, 576, 1536),
        (40, 4096, 14336),
        (128, 8192, 28672),
        (256, 4096, 14336),
    ],
)
def test_gated_product_is_one_launch(tokens: int, hidden: int, mlp: int, dtype: str) -> None:
    text = lower_gated(tokens, hidden, mlp, dtype)
    assert text.count("@mosaic_gpu_v2") == 1
    assert "dot_general" not in text


@pytest.mark.parametrize(
    ("tokens", "hidden", "mlp", "options"),
    [
        (1016, 512, 1024, {}),  # few tokens: cuBLAS is as fast
        (192, 4096, 14336, {}),
        (32, 4096, 14336, {}),  # few enough for Triton's products
        (64, 3584, 18944, {}),  # 148 tiles for 132 SMs: the second round would leave most of them idle
        (1028, 512, 1024, {}),  # TMA's rows come in eights
        (1024, 480, 1024, {}),
        (1024, 512, 1088, {}),
        (1024, 512, 1024, {"dtype": "float32"}),
        (1024, 512, 1024, {"backend": "reference"}),
        (1024, 512, 1024, {"bias": True}),
    ],
)
def test_gated_product_leaves_the_rest_to_xla(tokens: int, hidden: int, mlp: int, options: dict[str, Any]) -> None:
    text = lower_gated(tokens, hidden, mlp, **options)
    assert "@mosaic_gpu_v2" not in text
    assert text.count("dot_general") == 1


def test_layers_share_one_gated_product() -> None:
    text = lower_gated(1024, 512, 1024, layers=3)
    assert text.count("@mosaic_gpu_v2") == 1
    assert text.count("call @gated_product") == 3


def lower_projection(
    tokens: int,
    hidden: int,
    shape: tuple[int, int, int],
    dtype: str = "bfloat16",
    *,
    kv_dtype: str | None = None,
    norm: bool = False,
    bias: bool = False,
    layers: int = 1,
    backend: str = "auto",
) -> str:
    """Layers' attention from the projection on. shape: heads, kv_heads, head_dim; kv_dtype: of pages, if any."""
    heads, kv_heads, head_dim = shape
    width = (heads + 2 * kv_heads) * head_dim

    def attend(x: Any, weight: Any, angles: Any, norm_weight: Any, shift: Any, k: Any, v: Any, numbers: Any) -> Any:
        inputs = StepInputs(
            token_ids=numbers,
            positions=numbers,
            query_starts=numbers[:9],
            kv_lens=numbers[:8],
            block_tables=(numbers[:80].reshape(8, 10),),
            write_slots=(numbers,),
            backend=backend,
        )
        norms = {"q_norm": norm_weight, "k_norm": norm_weight} if norm else {}
        projection = Projection(
            weight=weight, bias=shift if bias else None, kv_heads=kv_heads, head_dim=head_dim, **norms
        )
        rotation = (angles, angles)
        if kv_dtype is None:
            return [attention_qkv(x, projection, rotation, inputs) for _ in range(layers)]
        return causal_attention_qkv(x, projection, rotation, inputs, LayerCache(k, v), window=None, group=0)

    return lower_for_hopper(
        attend,
        ((tokens, hidden), dtype),
        ((hidden, width), dtype),
        ((tokens, head_dim // 2), "float32"),
        ((head_dim,), dtype),
        ((width,), dtype),
        *[((40, kv_heads, 64, head_dim), kv_dtype or dtype)] * 2,
        ((tokens,), "int32"),
        **({"donate_argnums": (5, 6)} if kv_dtype else {}),
    )


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    ("tokens", "hidden", "shape", "dtype", "options"),
    [
        (8192, 1024, (16, 8, 128), "bfloat16", {"norm": True}),
        (4096, 4096, (32, 8, 128), "float16", {}),
        (6656, 896, (14, 2, 64), "bfloat16", {"bias": True}),
        (8192, 512, (5, 1, 128), "bfloat16", {"norm": True, "bias": True}),  # an odd count of blocks of columns
        (4096, 64, (32, 4, 128), "bfloat16", {}),  # one step
    ],
)
def test_projection_norms_rotation_and_write_are_one_launch(
    tokens: int, hidden: int, shape: tuple[int, int, int], dtype: str, options: dict[str, Any], paged: bool
) -> None:
    text = lower_projection(tokens, hidden, shape, dtype, kv_dtype=dtype if paged else None, **options)
    assert "dot_general" not in text
    assert "rope" not in text
    (kernel,) = (part for part in text.split("\n  func.func ") if part.startswith("private @qkv_product"))
    assert kernel.count("@mosaic_gpu_v2") == 1
    assert kernel.count("output_operand_alias<") == text.count("tf.aliasing_output") == (2 if paged else 0)


@pytest.mark.parametrize(
    ("tokens", "hidden", "shape", "options"),
    [
        (1016, 1024, (16, 8, 128), {}),  # few tokens
        (1536, 4096, (32, 8, 128), {}),  # a third round of tiles that would leave most SMs idle
        (2052, 1024, (16, 8, 128), {}),  # TMA's rows come in eights
        (4096, 1000, (16, 8, 128), {}),
        (4096, 1024, (16, 8, 128), {"dtype": "float32"}),
        (4096, 1024, (16, 8, 128), {"backend": "reference"}),
        (4096, 1024, (16, 8, 128), {"kv_dtype": "float8_e4m3fn"}),
        (7168, 960, (18, 9, 64), {"kv_dtype": "bfloat16"}),  # a block of columns with heads of q and of k
    ],
)
def test_qkv_product_leaves_the_rest_to_xla(
    tokens: int, hidden: int, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    if options.get("dtype") == "float32":
        options = {**options, "kv_dtype": "float32"}  # no kernel attends to such a projection where it lies
    text = lower_projection(tokens, hidden, shape, **options)
    assert "qkv_product" not in text
    assert text.count("dot_general") >= 1


def test_layers_share_one_qkv_product() -> None:
    text = lower_projection(2048, 1024, (16, 8, 128), layers=3, norm=True)
    assert text.count("private @qkv_product") == 1
    assert text.count("call @qkv_product") == 3


def all_norms(x: Any, weight: Any, bias: Any, backend: str = "auto") -> Any:
    return (
        rms_norm(x, weight, 1e-6, backend=backend),
        layer_norm(x, weight, None, 1e-6, backend=backend),
        layer_norm(x, weight, bias, 1e-6, backend=backend),
    )


@pytest.mark.parametrize(("rows", "hidden"), [(2048, 1024), (2051, 768), (8192, 256)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norms_of_many_rows_are_one_launch(rows: int, hidden: int, dtype: str) -> None:
    vector = ((hidden,), dtype)
    text = lower_for_hopper(all_norms, ((rows, hidden), dtype), vector, vector)
    assert text.count("@mosaic_gpu_v2") == 3
    assert "stablehlo.rsqrt" not in text


@pytest.mark.parametrize(
    ("rows", "hidden", "dtype", "backend"),
    [
        (2040, 1024, "bfloat16", "auto"),
        (4096, 4096, "bfloat16", "auto"),
        (4096, 384, "bfloat16", "auto"),
        (4096, 1024, "float32", "auto"),
        (4096, 1024, "bfloat16", "reference"),
        (4096, 1024, "bfloat16", "triton"),
    ],
)
def test_norms_leave_the_rest_to_xla(rows: int, hidden: int, dtype: str, backend: str) -> None:
    vector = ((hidden,), dtype)
    text = lower_for_hopper(functools.partial(all_norms, backend=backend), ((rows, hidden), dtype), vector, vector)
    assert "mosaic" not in text
