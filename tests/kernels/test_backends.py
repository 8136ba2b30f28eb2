"""Which backend serves a call, and what is said about those that do not."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

import pytest

from pjengine.config import EngineConfig
from pjengine.errors import ConfigError, KernelUnavailable
from pjengine.executables import ExecutableStore
from pjengine.factory import make_engine
from pjengine.pallas_kernels import describe_backends, describe_embedder_backends
from pjengine.pallas_kernels.backends import Backend, Target, accept, current_target, select
from pjengine.pallas_kernels.specs import AttentionSpec, EncoderStackSpec, GatedSpec, QKVSpec, RotationSpec
from pjengine.pallas_kernels.triton_support import triton_refusal
from tests.helpers import GOLDEN

CPU, HOPPER, AMPERE = Target("cpu"), Target("gpu", 90, 132), Target("gpu", 80, 108)
SPEC = AttentionSpec(heads=4, kv_heads=2, head_dim=64, page_size=16)
BGE_LARGE = EncoderStackSpec(hidden=1024, heads=16, mlp=4096, dtype="bfloat16")


def needs_hopper(spec: AttentionSpec, target: Target) -> str | None:
    return None if target.compute_capability == 90 else "needs Hopper"


BACKENDS = (
    Backend("mosaic", needs_hopper, "no.such.module", "f"),
    Backend("reference", accept, "pjengine.pallas_kernels.rope", "apply_rope"),
)


@pytest.mark.parametrize(("target", "name"), [(CPU, "reference"), (HOPPER, "mosaic"), (AMPERE, "reference")])
def test_auto_takes_the_first_that_can(target: Target, name: str) -> None:
    assert select("op", "auto", BACKENDS, SPEC, target).name == name


def test_a_gpu_left_to_the_reference_is_logged_once_with_reasons(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            select("op logged once", "auto", BACKENDS, SPEC, AMPERE)
    (record,) = caplog.records
    assert "op logged once is served by reference" in record.message
    assert "mosaic: needs Hopper" in record.message


def test_a_backend_asked_for_by_name_is_not_replaced() -> None:
    with pytest.raises(KernelUnavailable, match="mosaic: needs Hopper"):
        select("op", "mosaic", BACKENDS, SPEC, CPU)
    with pytest.raises(KernelUnavailable, match="triton: not implemented for this op"):
        select("op", "triton", BACKENDS, SPEC, HOPPER)
    assert select("op", "reference", BACKENDS, SPEC, HOPPER).name == "reference"


def test_unknown_names_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="attention_backend: expected auto, mosaic"):
        select("op", "cuda", BACKENDS, SPEC, CPU)


def test_a_backend_is_loaded_when_asked() -> None:
    assert BACKENDS[1].load().__name__ == "apply_rope"


def test_the_tests_run_on_the_cpu() -> None:
    assert current_target() == CPU


def test_description_names_every_op() -> None:
    rows = describe_backends(32, 8, 128, 64, "bfloat16", target=HOPPER)
    assert {op: backend for op, backend, _ in rows} == {
        "paged_attention (decode)": "mosaic",
        "paged_attention (mixed)": "mosaic",
        "packed_attention": "mosaic",
        "rope_qkv": "mosaic",
        "rope_write_kv": "mosaic",
    }
    on_cpu = describe_backends(32, 8, 128, 64, "float32", target=CPU)
    assert {backend for _, backend, _ in on_cpu} == {"reference"}
    odd = describe_backends(32, 8, 500, 64, "float16", target=HOPPER)
    assert odd[0][1] == "reference"
    assert "mosaic: head_dim must be" in odd[0][2]


@pytest.mark.parametrize(
    ("spec", "target", "backend", "served", "reason"),
    [
        (GatedSpec(4096, 14336), HOPPER, "auto", "mosaic", ""),
        (GatedSpec(4096, 14336), HOPPER, "triton", "mosaic", ""),
        (GatedSpec(4096, 14336), HOPPER, "reference", "reference", ""),
        (GatedSpec(4096, 14336), CPU, "auto", "reference", ""),
        (GatedSpec(4096, 14336), AMPERE, "auto", "reference", "needs compute capability 9.0, got 80"),
        (GatedSpec(4096, 14336, "float32"), HOPPER, "auto", "reference", "tensor cores take bfloat16 and float16"),
        (GatedSpec(960, 2560), HOPPER, "auto", "mosaic", ""),
        (GatedSpec(1000, 2560), HOPPER, "auto", "reference", "multiples of 64 and 128, got 1000 and 2560"),
    ],
)
def test_describe_gated_product(spec: GatedSpec, target: Target, backend: str, served: str, reason: str) -> None:
    rows = describe_backends(32, 8, 128, 64, "bfloat16", gated=spec, backend=backend, target=target)
    op, chosen, why = rows[-1]
    few = "33 to 128, 193 to 256, " if spec.mlp == 14336 else ""
    assert (op, chosen) == ("gated_product" + (f" ({few}from 1024 tokens)" if served == "mosaic" else ""), served)
    assert reason in why if reason else why == ""


@pytest.mark.parametrize(
    ("spec", "target", "backend", "served", "reason"),
    [
        (QKVSpec(1024, 16, 8, 128), HOPPER, "auto", "mosaic", ""),
        (QKVSpec(4096, 32, 8, 128, kv_dtype="bfloat16"), HOPPER, "mosaic", "mosaic", ""),
        (QKVSpec(1024, 16, 8, 128), HOPPER, "triton", "reference", ""),
        (QKVSpec(1024, 16, 8, 128), HOPPER, "reference", "reference", ""),
        (QKVSpec(1024, 16, 8, 128), CPU, "auto", "reference", ""),
        (QKVSpec(1024, 16, 8, 128), AMPERE, "auto", "reference", "needs compute capability 9.0, got 80"),
        (QKVSpec(1024, 16, 8, 128, "float32"), HOPPER, "auto", "reference", "tensor cores take bfloat16 and float16"),
        (QKVSpec(1024, 16, 8, 96), HOPPER, "auto", "reference", "head_dim must be 64 or 128, got 96"),
        (QKVSpec(576, 9, 3, 64), HOPPER, "auto", "reference", "multiples of 64 and 128, got 576 and 960"),
        (QKVSpec(960, 6, 3, 64, kv_dtype="bfloat16"), HOPPER, "auto", "reference", "got 6 and 3 heads of 64"),
        (QKVSpec(1024, 16, 8, 128, kv_dtype="float16"), HOPPER, "auto", "reference", "pages must be in the"),
    ],
)
def test_describe_qkv_product(spec: QKVSpec, target: Target, backend: str, served: str, reason: str) -> None:
    op = "qkv_product" if spec.kv_dtype is None else "qkv_product_paged"
    if spec.kv_dtype is None:
        rows = describe_embedder_backends(SPEC, qkv=spec, backend=backend, target=target)
    else:
        rows = describe_backends(4, 2, 64, 16, "bfloat16", qkv=spec, backend=backend, target=target)
    condition = " (from 1024 tokens, where its tiles are full enough)" if served == "mosaic" else ""
    assert rows[-1][:2] == (op + condition, served)
    assert reason in rows[-1][2] if reason else rows[-1][2] == ""


@pytest.mark.parametrize(
    ("stack", "backend", "target", "expected"),
    [
        (BGE_LARGE, "auto", HOPPER, [("packed_attention", "mosaic"), ("encoder_stack (up to 16 tokens)", "mosaic")]),
        (BGE_LARGE, "reference", HOPPER, [("packed_attention", "reference")]),
        (BGE_LARGE, "auto", CPU, [("packed_attention", "reference")]),
        (None, "auto", HOPPER, [("packed_attention", "mosaic")]),
    ],
)
def test_describe_an_embedder(
    stack: EncoderStackSpec | None, backend: str, target: Target, expected: list[tuple[str, str]]
) -> None:
    attention = AttentionSpec(16, 16, 64, causal=False)
    rows = describe_embedder_backends(attention, backend=backend, stack=stack, target=target)
    assert [(op, chosen) for op, chosen, _ in rows] == expected


def test_an_embedder_that_rotates_or_is_refused() -> None:
    narrow = dataclasses.replace(BGE_LARGE, mlp=2048)
    rows = describe_embedder_backends(
        AttentionSpec(16, 8, 128),
        rotation=RotationSpec(16, 8, 128),
        gated=GatedSpec(1024, 3072),
        stack=narrow,
        target=HOPPER,
    )
    assert [row[:2] for row in rows[:3]] == [
        ("packed_attention", "mosaic"),
        ("rope_qkv", "mosaic"),
        ("gated_product (from 1024 tokens)", "mosaic"),
    ]
    assert rows[3][1] == "none"
    assert "four times as wide as hidden, got 2048" in rows[3][2]


@pytest.mark.parametrize(
    ("model", "ops"),
    [
        ("bert", ["packed_attention"]),
        ("modernbert", ["packed_attention", "rope_qkv", "qkv_product"]),
        ("qwen3-embedding", ["packed_attention", "rope_qkv", "gated_product", "qkv_product"]),
    ],
)
def test_embedding_engines_say_what_serves_them(model: str, ops: list[str], caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig.make(str(GOLDEN / model), task="embed", max_num_batched_tokens=64, max_model_len=64)
    with caplog.at_level(logging.INFO):
        engine = make_engine(config, progress=False)
    assert [(op, backend) for op, backend, _ in engine.info.backends] == [(op, "reference") for op in ops]
    assert set(f"{op}: reference" for op in ops) <= {record.getMessage() for record in caplog.records}


@pytest.mark.parametrize(
    ("model", "task", "op"), [("llama", "generate", "paged_attention (decode)"), ("bert", "embed", "packed_attention")]
)
def test_a_backend_that_cannot_serve_here_is_refused_before_anything_is_compiled(
    model: str, task: str, op: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig.make(str(GOLDEN / model), task=task, attention_backend="mosaic")
    with pytest.raises(KernelUnavailable, match=re.escape(f"attention_backend: 'mosaic' cannot serve {op} of")):
        make_engine(config, progress=False)
    assert "could not be compiled" not in caplog.text


@pytest.fixture
def triton_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


@pytest.mark.usefixtures("triton_installed")
def test_triton_serves_attention_from_ampere_on() -> None:
    rows = describe_backends(32, 8, 80, 64, "float32", target=AMPERE)
    assert [backend for _, backend, _ in rows] == ["triton", "triton", "triton", "reference", "reference"]
    forced = describe_backends(32, 8, 128, 64, "bfloat16", backend="triton", target=HOPPER)
    assert [backend for _, backend, _ in forced] == ["triton", "triton", "triton", "reference", "mosaic"]


@pytest.mark.usefixtures("triton_installed")
@pytest.mark.parametrize(
    ("change", "capability", "reason"),
    [
        ({}, None, "needs compute capability 8.0 or later"),
        ({}, 75, "needs compute capability 8.0 or later, got 75"),
        ({"kv_dtype": "float8_e4m3fn"}, 80, "needs compute capability 8.9"),
        ({"kv_dtype": "float16"}, 90, "got bfloat16 and float16"),
        ({"head_dim": 512}, 90, "head_dim must be at most 256, got 512"),
        ({"heads": 64}, 90, "at most 16 query heads per KV head, got 32"),
    ],
)
def test_triton_refuses_by_name(change: dict[str, Any], capability: int | None, reason: str) -> None:
    refusal = triton_refusal(dataclasses.replace(SPEC, **change), Target("gpu", capability, 108))
    assert refusal is not None
    assert reason in refusal


def test_without_triton_the_refusal_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'pjengine[triton]'" in str(triton_refusal(SPEC, AMPERE))


@pytest.mark.parametrize(("target", "imported"), [(HOPPER, ["jax.experimental.mosaic.gpu"]), (CPU, []), (AMPERE, [])])
def test_programs_traced_elsewhere_find_the_runtime(
    monkeypatch: pytest.MonkeyPatch, target: Target, imported: list[str]
) -> None:
    """Forward steps are lowered in other processes or come from the cache: this one never traces a kernel."""
    seen: list[str] = []
    monkeypatch.setattr("pjengine.executables.current_target", lambda: target)
    monkeypatch.setattr("importlib.import_module", seen.append)
    ExecutableStore(None, "setting")
    assert seen == imported
