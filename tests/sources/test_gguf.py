"""GGUF files: config and tensors out of llama.cpp's names and orders, and what damaged files are told."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pjengine.errors import ModelError
from pjengine.models import load
from pjengine.models.gguf_files import undo_permutation
from pjengine.models.gguf_format import read_header, read_tensor
from pjengine.models.loading import choose_dtype
from pjengine.models.sources import resolve
from tests.sources.checkpoints import CONFIG, llama_tensors, permute, write_directory, write_gguf

Q = gguf.GGMLQuantizationType


def test_equals_the_safetensors_it_was_made_of(tmp_path: Path) -> None:
    _, expected, expected_config = load(str(write_directory(tmp_path / "directory")))
    _, params, config = load(str(write_gguf(tmp_path / "model.gguf")))
    assert config.rope == expected_config.rope
    np.testing.assert_allclose(config.rms_norm_eps, expected_config.rms_norm_eps, rtol=1e-6)  # GGUF keeps float32
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_config(tmp_path: Path, tied: bool) -> None:
    config = {**CONFIG, "tie_word_embeddings": tied}
    source = resolve(str(write_gguf(tmp_path / "model.gguf", config=config)))
    assert source.config["tie_word_embeddings"] is tied
    assert source.config["vocab_size"] == 80
    assert choose_dtype(source, "auto", platform="gpu") == "bfloat16"


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_other_architectures_keep_their_rows(tmp_path: Path, arch: str) -> None:
    """llama.cpp reorders Q and K for its llama architecture only."""
    tensors = llama_tensors()
    path = write_gguf(tmp_path / "model.gguf", tensors, arch=arch)
    assert resolve(str(path)).model_type == arch
    stored = read_header(path).tensors["blk.0.attn_q.weight"]
    np.testing.assert_array_equal(
        read_tensor(read_header(path), stored), tensors["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1])
def test_quantised_weights_are_the_librarys(tmp_path: Path, kind: Q) -> None:
    tensors = llama_tensors()
    params = load(str(write_gguf(tmp_path / "model.gguf", tensors, quantization=kind)))[1]
    embedding = tensors["model.embed_tokens.weight"]
    expected = gguf.quants.dequantize(gguf.quants.quantize(embedding, kind), kind)
    np.testing.assert_array_equal(params["embed"], expected)
    assert np.abs(params["embed"] - embedding).mean() < 0.2  # and close to what was quantised


@given(heads=st.integers(1, 4), half=st.integers(1, 4), columns=st.integers(0, 3))
def test_permutation_is_undone(heads: int, half: int, columns: int) -> None:
    shape = (heads * half * 2, columns) if columns else (heads * half * 2,)
    tensor = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    np.testing.assert_array_equal(undo_permutation(permute(tensor, heads), heads), tensor)


def llama3_factors(factor: float) -> np.ndarray:
    """As llama.cpp's converter computes rope_freqs.weight (LlamaModel.generate_extra_tensors)."""
    frequencies = 1.0 / (CONFIG["rope_theta"] ** (np.arange(0, 16, 2, dtype=np.float32) / 16))
    factors = []
    for frequency in frequencies:
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4.0:
            factors.append(1.0)
        elif wavelength > 8192 / 1.0:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_rope_scaling_follows_from_its_factors(tmp_path: Path) -> None:
    source = resolve(str(write_gguf(tmp_path / "model.gguf", extra={"rope_freqs.weight": llama3_factors(8.0)})))
    assert source.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    load(str(tmp_path / "model.gguf"))


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    factors = llama3_factors(8.0) ** 2
    with pytest.raises(ModelError, match=r"rope_freqs\.weight: rotary factors other than Llama 3\.1's"):
        resolve(str(write_gguf(tmp_path / "model.gguf", extra={"rope_freqs.weight": factors})))


def test_linear_rope_scaling(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    source = resolve(str(write_gguf(tmp_path / "model.gguf", metadata=metadata)))
    assert source.config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metadata": {"llama.block_count": 9}}, r"block_count is 9, but there are tensors of 2 layers"),
        ({"arch": "mamba"}, r"general\.architecture: 'mamba' is not supported in GGUF; llama, qwen2, qwen3 are"),
        ({"metadata": {"llama.attention.head_count_kv": [2, 1]}}, r"num_key_value_heads: differs between layers"),
        (
            {"extra": {"blk.0.ffn_gate_exps.weight": np.zeros((2, 2), np.float32)}},
            r"unknown tensors: blk\.0\.ffn_gate_exps",
        ),
    ],
)
def test_files_that_cannot_be_honoured(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(str(write_gguf(tmp_path / "model.gguf", **options)))


def test_vocabulary_only_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tensor token_embd\.weight: a vocabulary-only file"):
        resolve(str(write_gguf(tmp_path / "model.gguf", {})))


def test_missing_metadata(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"model\.gguf: GGUF metadata has no 'llama\.embedding_length'"):
        resolve(str(tmp_path / "model.gguf"))


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "whole.gguf", metadata={"tokenizer.ggml.tokens": ["a", "b", "c"]}).read_bytes()
    path = tmp_path / "cut.gguf"
    header = data.index(b"output_norm.weight") + 200
    for length in [*range(0, header, 7), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf: "):
            read_header(path)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 9), "GGUF version 9"),
        (4, struct.pack(">I", 3), "GGUF version 50331648"),
        (8, struct.pack("<Q", 2**40), "damaged or truncated GGUF header"),
        (16, struct.pack("<Q", 2**63), "damaged or truncated GGUF header"),
        (24, struct.pack("<Q", 2**62), "damaged or truncated GGUF header"),
    ],
)
def test_damaged_header(tmp_path: Path, at: int, value: bytes, message: str) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        resolve(str(path))


def test_metadata_is_what_the_library_reads(tmp_path: Path) -> None:
    metadata = {
        "a.text": "é",
        "a.flag": True,
        "a.number": 7,
        "a.real": 0.5,
        "a.texts": ["x", "yy", ""],
        "a.reals": [1.5, 2.5],
    }
    path = write_gguf(tmp_path / "model.gguf", metadata=metadata)
    reader, header = gguf.GGUFReader(path), read_header(path)
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == expected
    assert {i.name: (i.shape, i.ggml_type, i.offset) for i in header.tensors.values()} == {
        t.name: (tuple(map(int, t.shape[::-1])), int(t.tensor_type), t.data_offset) for t in reader.tensors
    }
