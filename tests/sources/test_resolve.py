"""`resolve`: what each kind of name gives, and what each kind of broken directory is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from pjengine.errors import ModelError
from pjengine.models.sources import Pooling, resolve
from tests.sources.checkpoints import CONFIG, write_directory, write_gguf


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def sentence_transformer(path: Path, **pooling: Any) -> Path:
    write_directory(path)
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": where} for kind, where in kinds.items()]
    write_json(path / "modules.json", modules)
    write_json(path / "1_Pooling" / "config.json", {"word_embedding_dimension": 64, **pooling})
    write_json(path / "sentence_bert_config.json", {"max_seq_length": 100})
    return path


def test_directory(tmp_path: Path) -> None:
    source = resolve(str(write_directory(tmp_path)))
    assert source.kind == "safetensors"
    assert source.model_type == "llama"
    assert source.config["hidden_size"] == 64
    assert source.eos_token_ids == (2,)
    assert source.default_sampling == {}
    assert source.pooling is None


def test_generation_config_is_honoured(tmp_path: Path) -> None:
    write_directory(tmp_path)
    generation = {"eos_token_id": [5, 7], "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}
    write_json(tmp_path / "generation_config.json", {**generation, "do_sample": True, "transformers_version": "5.0"})
    source = resolve(str(tmp_path))
    assert source.eos_token_ids == (5, 7)
    assert source.default_sampling == {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}


def test_gguf_file(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.eot_token_id": 3, "general.sampling.temp": 0.5, "general.sampling.top_k": 30}
    source = resolve(str(write_gguf(tmp_path / "model.gguf", metadata=metadata)))
    assert source.kind == "gguf"
    assert source.eos_token_ids == (2, 3)
    assert source.default_sampling == {"temperature": 0.5, "top_k": 30}


def test_sentence_transformers_directory(tmp_path: Path) -> None:
    path = sentence_transformer(tmp_path, pooling_mode_mean_tokens=True, pooling_mode_cls_token=False)
    assert resolve(str(path)).pooling == Pooling("mean", normalize=True, max_seq_length=100)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("mean", "mean"),
        ("cls", "cls"),
        ("lasttoken", "last"),
        ("max", "max"),
        ("weightedmean", "weightedmean"),
        ("mean_sqrt_len_tokens", "mean_sqrt_len"),
    ],
)
def test_pooling_mode_by_name(tmp_path: Path, name: str, mode: str) -> None:
    """As sentence-transformers 6 writes it."""
    pooling = resolve(str(sentence_transformer(tmp_path, pooling_mode=name))).pooling
    assert pooling is not None
    assert pooling.mode == mode


@pytest.mark.parametrize("name", ["sum", ["cls", "mean"], None])
def test_named_pooling_that_cannot_be_honoured(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ModelError, match=r"1_Pooling.config\.json: pooling_mode: expected one of cls, mean, max"):
        resolve(str(sentence_transformer(tmp_path, pooling_mode=name)))


@pytest.mark.parametrize(
    "modes", [{}, {"pooling_mode_sum_tokens": True}, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}]
)
def test_poolings_that_cannot_be_honoured(tmp_path: Path, modes: dict[str, bool]) -> None:
    with pytest.raises(ModelError, match=r"1_Pooling.config\.json: expected exactly one of .*pooling_mode_mean_tokens"):
        resolve(str(sentence_transformer(tmp_path, **modes)))


def test_unknown_sentence_transformers_module(tmp_path: Path) -> None:
    sentence_transformer(tmp_path, pooling_mode_mean_tokens=True)
    write_json(tmp_path / "modules.json", [{"type": "sentence_transformers.models.CNN", "path": "2_CNN"}])
    with pytest.raises(ModelError, match=r"modules\.json: 'CNN' is not supported"):
        resolve(str(tmp_path))


def test_prompts(tmp_path: Path) -> None:
    sentence_transformer(tmp_path, pooling_mode_mean_tokens=True)
    file = tmp_path / "config_sentence_transformers.json"
    prompts = {"query": "find: ", "document": ""}
    write_json(file, {"prompts": prompts, "default_prompt_name": "query"})
    sentence = resolve(str(tmp_path)).sentence
    assert (sentence.prompts, sentence.default_prompt) == (prompts, "query")
    for content, message in (
        (
            {"prompts": prompts, "default_prompt_name": "passage"},
            "default_prompt_name: expected one of query, document",
        ),
        ({"prompts": ["find: "]}, "prompts: expected an object of texts by name"),
        ({"activation_fn": "mine.Swish"}, "activation_fn: expected torch.nn's Identity, Sigmoid, Softmax"),
    ):
        write_json(file, content)
        with pytest.raises(ModelError, match=message):
            resolve(str(tmp_path))
    write_json(file, {"prompts": prompts})
    sentence_transformer(tmp_path, pooling_mode_mean_tokens=True, include_prompt=False)
    with pytest.raises(ModelError, match=r"1_Pooling.config\.json: include_prompt: expected true, got false"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("kinds", [["Transformer", "Normalize", "Pooling"], ["Transformer", "Dense"]])
def test_modules_in_an_order_that_cannot_be_honoured(tmp_path: Path, kinds: list[str]) -> None:
    sentence_transformer(tmp_path, pooling_mode_mean_tokens=True)
    write_json(tmp_path / "modules.json", [{"type": f"sentence_transformers.models.{k}", "path": k} for k in kinds])
    with pytest.raises(ModelError, match=r"modules\.json: expected the order Transformer, Pooling, Dense, Normalize"):
        resolve(str(tmp_path))


def test_dummy_needs_only_a_config(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", CONFIG)
    with pytest.raises(ModelError, match=r"has no weights .*--load-format dummy"):
        resolve(str(tmp_path))
    assert resolve(str(tmp_path), "dummy").kind == "dummy"


def test_load_format_that_the_files_do_not_have(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"load_format: 'gguf' was asked for, but .* holds safetensors"):
        resolve(str(write_directory(tmp_path)), "gguf")


def test_unknown_name_lists_what_would_do() -> None:
    with pytest.raises(ModelError, match=r"'no-such-model' is no directory.*smollm2-135m-instruct"):
        resolve("no-such-model")


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json: not a model directory"):
        resolve(str(tmp_path))
    write_gguf(tmp_path / "weights.gguf")
    with pytest.raises(ModelError, match=r"has no config\.json; give the file itself: .*weights\.gguf"):
        resolve(str(tmp_path))


def test_single_file_that_is_no_gguf(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a single file must be a \.gguf"):
        resolve(str(write_directory(tmp_path) / "model.safetensors"))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", r"config\.json: not readable as JSON"),
        ("config.json", "[]", r"config\.json: expected a JSON object, got list"),
        ("config.json", "{}", r"config\.json: model_type: expected a string such as 'llama', got None"),
        (
            "generation_config.json",
            '{"eos_token_id": "</s>"}',
            r"generation_config\.json: eos_token_id: expected a token id",
        ),
        (
            "generation_config.json",
            '{"eos_token_id": [1, -1]}',
            r"eos_token_id: expected a token id or a list of them, got \[1, -1\]",
        ),
        ("modules.json", "{}", r"modules\.json: expected a JSON array, got dict"),
    ],
)
def test_damaged_json(tmp_path: Path, file: str, text: str, message: str) -> None:
    write_directory(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ModelError, match=message):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("offline", "reason"), [(True, "HF_HUB_OFFLINE is set"), (False, r"the hub cannot be reached \(no route")]
)
def test_hub_id_without_a_hub(monkeypatch: pytest.MonkeyPatch, offline: bool, reason: str) -> None:
    def unreachable(repo: str, *, local_files_only: bool, **_: Any) -> str:
        assert local_files_only is offline
        raise LocalEntryNotFoundError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match=rf"meta/llama is not in the local hub cache and {reason}.*give the directory"):
        resolve("meta/llama")


def test_hub_id_in_the_local_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []
    files = ["model.safetensors", "2_Dense/model.safetensors", "onnx/model.safetensors", "1_Pooling/config.json"]
    fetched: list[list[str]] = []

    def snapshot(repo: str, *, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        chosen = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        fetched.append(list(chosen))
        return str(write_directory(tmp_path / repo))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve("meta/llama").path == tmp_path / "meta/llama"
    assert resolve("meta/llama", "dummy").kind == "dummy"
    assert "*.safetensors" in asked[0]
    assert "*.safetensors" not in asked[1]  # a dummy model fetches no weights
    assert not any("bin" in pattern for pattern in asked[0])
    assert fetched == [["model.safetensors", "2_Dense/model.safetensors", "1_Pooling/config.json"], files[3:]]
