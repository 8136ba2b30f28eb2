"""`paged_attention_qkv`: what it gives, what one kernel serves of it, and that its pages stay where they are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels import paged_attention, paged_attention_qkv, rope_write_kv_qkv
from tests.kernels.hopper import lower_for_hopper, on_hopper
from tests.kernels.ragged_cases import paged_case

# heads, kv_heads, head_dim, page_size
SHAPES = [(32, 8, 128, 64), (9, 3, 64, 16), (14, 2, 64, 128), (16, 1, 128, 32)]
LLAMA_8B = SHAPES[0]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("decode", [True, False])
def test_a_projection_is_written_and_attended(decode: bool, norm: bool) -> None:
    """What `rope_write_kv_qkv` and `paged_attention` give, one after the other."""
    rng = np.random.default_rng(0)
    lens = [7, 0, 48, 1]
    case = paged_case(rng, [1] * 4, lens, heads=6, kv_heads=2, head_dim=16, page_size=16)
    _, k, v, starts, kv_lens, tables = case.arrays()
    qkv = jnp.asarray(rng.standard_normal((4, 10, 16)), jnp.float32)
    angles = jnp.asarray(rng.uniform(0, 6, (4, 8)), jnp.float32)
    weights = jnp.asarray(rng.uniform(0.5, 2, (2, 16)), jnp.float32)
    norms: dict[str, Any] = {"q_norm": weights[0], "k_norm": weights[1]} if norm else {}
    written = (qkv, jnp.cos(angles), jnp.sin(angles), k, v, jnp.asarray(case.last_slots()))
    actual = paged_attention_qkv(*written, starts, kv_lens, tables, scale=0.3, decode=decode, window=40, **norms)
    q, k, v = rope_write_kv_qkv(*written, **norms)
    out = paged_attention(q, k, v, starts, kv_lens, tables, scale=0.3, decode=decode, window=40)
    for a, b in zip(actual, (out, k, v), strict=True):
        np.testing.assert_array_equal(a, b)


def test_projections_that_contradict_their_pages_are_refused() -> None:
    case = paged_case(
        np.random.default_rng(0), [1] * 3, [5, 6, 7], heads=4, kv_heads=2, head_dim=64, page_size=16, dtype="bfloat16"
    )
    _, k, v, starts, lens, tables = case.arrays()
    qkv, angles, slots = jnp.zeros((3, 8, 64), jnp.bfloat16), jnp.zeros((3, 32)), jnp.asarray(case.last_slots())

    def run(qkv: Any = qkv, cos: Any = angles, slots: Any = slots, lens: Any = lens, **options: Any) -> Any:
        def attend(*arrays: Any) -> Any:
            return paged_attention_qkv(*arrays, scale=1.0, decode=True, **options)

        with on_hopper():
            arrays = (qkv, cos, angles, k, v, slots, starts, lens, tables)
            return jax.eval_shape(attend, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays))

    assert run()[0].shape == (3, 4, 64)
    with pytest.raises(ValueError, match=r"qkv: expected \[T, heads \+ 2 \* 2, head_dim\]"):
        run(qkv[:, :5])
    with pytest.raises(ValueError, match="k_pages"):
        run(qkv[..., :32])
    with pytest.raises(ValueError, match=r"cos, sin: expected \[3, 32\]"):
        run(cos=angles[:, :16])
    with pytest.raises(ValueError, match=r"write_slots: expected \[3\]"):
        run(slots=slots[:2])
    with pytest.raises(ValueError, match="query_starts, block_tables"):
        run(lens=lens[:2])
    with pytest.raises(ValueError, match="q_norm, k_norm: expected both or neither"):
        run(q_norm=jnp.ones(64, jnp.bfloat16))


def lower_projection(
    shape: tuple[int, int, int, int],
    *,
    layers: int = 1,
    rows: int = 8,
    tokens: int | None = None,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    norm: bool = False,
    backend: str = "auto",
    **options: Any,
) -> str:
    """Layers with pages of their own, as a model has them, donated; one row a token unless `tokens`."""
    heads, kv_heads, head_dim, page_size = shape
    tokens = tokens or rows

    def stack(qkv: Any, cos: Any, sin: Any, slots: Any, starts: Any, lens: Any, tables: Any, weight: Any, *pages: Any):
        norms = {"q_norm": weight, "k_norm": weight} if norm else {}
        written = []
        for k, v in zip(pages[::2], pages[1::2], strict=True):
            out, k, v = paged_attention_qkv(
                qkv, cos, sin, k, v, slots, starts, lens, tables, scale=0.1, backend=backend, **norms, **options
            )
            qkv = jnp.concatenate([out, qkv[:, heads:]], axis=1)
            written += [k, v]
        return qkv, written

    return lower_for_hopper(
        stack,
        ((tokens, heads + 2 * kv_heads, head_dim), dtype),
        *[((tokens, head_dim // 2), "float32")] * 2,
        ((tokens,), "int32"),
        ((rows + 1,), "int32"),
        ((rows,), "int32"),
        ((rows, 10), "int32"),
        ((head_dim,), dtype),
        *[((40, kv_heads, page_size, head_dim), kv_dtype or dtype)] * (2 * layers),
        donate_argnums=tuple(range(8, 8 + 2 * layers)),
    )


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        *[(shape, {"norm": True}) for shape in (*SHAPES, (28, 4, 128, 16), (8, 4, 256, 16), (8, 8, 80, 128))],
        *[(shape, {"window": 100}) for shape in (LLAMA_8B, (32, 32, 96, 32), (8, 8, 80, 128))],
        (LLAMA_8B, {"backend": "mosaic"}),
        (SHAPES[1], {"dtype": "float16"}),
    ],
)
def test_decode_of_a_projection_is_one_launch(shape: tuple[int, int, int, int], options: dict[str, Any]) -> None:
    served = shape[2] != 80 or not options.get("norm")  # five or ten threads a head: their squares are no shuffles' sum
    text = lower_projection(shape, decode=True, **options)
    calls = [line for line in text.splitlines() if "@mosaic_gpu_v2" in line]
    assert len(calls) == (1 if served else 2)
    assert sum(call.count("output_operand_alias<") for call in calls) == 2
    assert text.count("tf.aliasing_output") == 2


def test_layers_share_one_decode_of_projections() -> None:
    few, many = (lower_projection(LLAMA_8B, layers=n, decode=True) for n in (2, 8))
    assert many.count("@mosaic_gpu_v2") == few.count("@mosaic_gpu_v2")
    assert many.count("tf.aliasing_output") == 16


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({"decode": False, "tokens": 100}, 3),
        ({"decode": True, "kv_dtype": "float8_e4m3fn"}, 2),
        ({"decode": True, "backend": "reference"}, 0),
        ({"decode": True, "dtype": "float32"}, 1),  # pages are written by a kernel, attention is the reference's
    ],
)
def test_other_projections_are_written_first(options: dict[str, Any], kernels: int) -> None:
    assert lower_projection(LLAMA_8B, **options).count("@mosaic_gpu_v2") == kernels
