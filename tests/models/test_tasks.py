"""What a model is for, and engines that classify: from token ids to logits through `make_engine`."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from pjengine.activations import activate
from pjengine.config import EngineConfig
from pjengine.embedding_engine import EmbeddingEngine
from pjengine.engine import Engine
from pjengine.errors import InvalidRequest, ModelError
from pjengine.factory import make_engine
from pjengine.models import heads, load
from pjengine.models.loading import model_of
from pjengine.models.sources import resolve
from pjengine.models.tasks import head_of
from pjengine.request import Output, Request
from pjengine.step_inputs import StepInputs, packed_inputs
from pjengine.tokenizer import load_tokenizer
from tests.helpers import GOLDEN, load_golden, relative_error, split_rows


def copied(name: str, to: Path, **fields: Any) -> Path:
    """A golden checkpoint with other fields in its config.json."""
    shutil.copytree(GOLDEN / name, to, dirs_exist_ok=True)
    write_json(to / "config.json", json.loads((to / "config.json").read_text()) | fields)
    return to


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def engine_of(path: Path, **options: Any) -> Engine | EmbeddingEngine:
    config = EngineConfig.make(str(path), dtype="float32", max_num_batched_tokens=256, compile_cache="", **options)
    return make_engine(config, progress=False)


def run(engine: Engine | EmbeddingEngine, requests: list[Request]) -> list[Output]:
    for request in requests:
        engine.add(request)
    outputs: dict[str, Output] = {}
    while engine.has_work:
        outputs |= {output.request_id: output for output in engine.step()}
    return [outputs[request.request_id] for request in requests]


@pytest.fixture(scope="module")
def classifier() -> Engine | EmbeddingEngine:
    return engine_of(GOLDEN / "bert-classifier")


def test_logits_of_pairs(classifier: EmbeddingEngine) -> None:
    """The segments tell the two texts apart: without them the logits are others."""
    golden, _ = load_golden("bert-classifier")
    rows, types = (split_rows(golden[key], golden["starts"]) for key in ("tokens", "token_types"))
    requests = [
        Request(request_id=str(i), prompt_token_ids=row, token_type_ids=kinds)
        for i, (row, kinds) in enumerate(zip(rows, types, strict=True))
    ]
    requests += [Request(request_id=f"single {i}", prompt_token_ids=row) for i, row in enumerate(rows)]
    outputs = run(classifier, requests)
    logits = np.stack([np.frombuffer(output.logits or b"", "<f4") for output in outputs])
    assert logits.shape == (10, 1)
    assert relative_error(logits[:5], golden["logits"]) < 1e-4
    assert relative_error(logits[5:], golden["logits"]) > 1e-2
    assert {output.embedding for output in outputs} == {None}


def test_info_of_a_classifier(classifier: EmbeddingEngine) -> None:
    info = classifier.info
    assert (info.kind, info.labels, info.activation, info.token_types) == ("classify", ("LABEL_0",), "sigmoid", 2)
    assert info.embedding_size == 0


@pytest.mark.parametrize(
    ("types", "message"),
    [([0], "1 for 3 tokens"), ([0, 1, 2], r"expected each in 0\.\.1, got 0\.\.2"), ([0, -1, 1], "got -1")],
)
def test_token_types_that_cannot_be(classifier: EmbeddingEngine, types: list[int], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"token_type_ids: .*{message}"):
        classifier.add(Request(request_id="a", prompt_token_ids=[1, 2, 3], token_type_ids=types))
    assert not classifier.has_work


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedder with two Dense modules, as sentence-transformers writes EmbeddingGemma's."""
    path = copied("roberta", tmp_path_factory.mktemp("dense"))
    rng = np.random.default_rng(0)
    kinds = ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    folders = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], 1))]
    write_json(
        path / "modules.json",
        [{"type": f"sentence_transformers.models.{k}", "path": f} for k, f in zip(kinds, folders, strict=True)],
    )
    write_json(path / "1_Pooling/config.json", {"pooling_mode": "mean"})
    for folder, (inputs, outputs), activation, bias in (
        ("2_Dense", (64, 96), "activation.Tanh", True),
        ("3_Dense", (96, 48), "linear.Identity", False),
    ):
        sizes = {"in_features": inputs, "out_features": outputs}
        write_json(
            path / folder / "config.json",
            {**sizes, "bias": bias, "activation_function": f"torch.nn.modules.{activation}"},
        )
        tensors = {"linear.weight": rng.normal(size=(outputs, inputs)) / 8} | (
            {"linear.bias": rng.normal(size=outputs)} if bias else {}
        )
        save_file({k: v.astype(np.float32) for k, v in tensors.items()}, path / folder / "model.safetensors")
    return path


def test_dense_modules(dense: Path) -> None:
    golden, _ = load_golden("roberta")
    _, params, _ = load(str(dense))
    (first, second) = params["head"]
    starts = golden["starts"]
    pooled = np.stack([golden["hidden"][a:b].mean(0) for a, b in itertools.pairwise(starts)])
    expected = np.tanh(pooled @ first["weight"] + first["weight_bias"]) @ second["weight"]
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    engine = engine_of(dense)
    assert (engine.info.kind, engine.info.embedding_size) == ("embed", 48)
    rows = split_rows(golden["tokens"], starts)
    outputs = run(engine, [Request(request_id=str(i), prompt_token_ids=row) for i, row in enumerate(rows)])
    vectors = np.stack([np.frombuffer(output.embedding or b"", "<f4") for output in outputs])
    assert relative_error(vectors, expected) < 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"in_features": 32}, r"2_Dense: in_features: expected 64, got 32"),
        ({"out_features": 0}, r"2_Dense.config\.json: out_features: expected a whole number from 1 on, got 0"),
        ({"activation_function": "my.Swish"}, r"activation_function: expected one of torch\.nn.* got 'my\.Swish'"),
        (
            {"module_input_name": "token_embeddings"},
            r"module_input_name: expected 'sentence_embedding', got 'token_emb",
        ),
        ({"use_residual": True}, r"use_residual: expected false, got True"),
    ],
)
def test_dense_modules_that_cannot_be_honoured(dense: Path, tmp_path: Path, fields: Any, message: str) -> None:
    shutil.copytree(dense, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "2_Dense" / "config.json"
    write_json(file, json.loads(file.read_text()) | fields)
    with pytest.raises(ModelError, match=message):
        load(str(tmp_path))


def logit_score(name: str, to: Path, **config: Any) -> Path:
    """A golden decoder as sentence-transformers keeps a reranker that scores by two tokens' logits."""
    path = copied(name, to)
    kinds = {"Transformer": "", "LogitScore": "1_LogitScore"}
    write_json(path / "modules.json", [{"type": f"sentence_transformers.{k}", "path": f} for k, f in kinds.items()])
    write_json(path / "1_LogitScore/config.json", config)
    return path


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])  # with an lm_head of its own, and with the embeddings
@pytest.mark.parametrize("false", [3, None])
def test_logit_score(tmp_path: Path, name: str, false: int | None) -> None:
    path = logit_score(name, tmp_path, true_token_id=7, false_token_id=false)
    golden, _ = load_golden(name)
    model, params, config = load(str(path), dtype="float32")
    head = head_of(resolve(str(path)), model, config)
    assert head is not None
    assert (head.task, head.labels, head.activation) == ("classify", ("relevance",), "sigmoid")

    @jax.jit
    def score(params: Any, inputs: StepInputs) -> jax.Array:
        hidden, _ = model.forward(params, inputs, None, config)
        return heads.apply(head, params, hidden, inputs)

    last = golden["logits"][golden["starts"][1:] - 1]
    expected = last[:, [7]] - (0 if false is None else last[:, [false]])
    rows = split_rows(golden["tokens"], golden["starts"])
    assert relative_error(score(params, packed_inputs(rows)), expected) < 1e-4


@pytest.mark.parametrize("config", [{}, {"true_token_id": "yes"}, {"true_token_id": 1, "false_token_id": -1}])
def test_logit_score_without_token_ids(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"1_LogitScore.config\.json: (true|false)_token_id: expected a whole number"):
        resolve(str(logit_score("qwen3", tmp_path, **config)))


def test_yes_and_no_of_the_tokenizer(tmp_path: Path) -> None:
    """Qwen3-Reranker as it was published: nothing but its name says that it is one, so the user does."""
    path = copied("qwen3", tmp_path)
    vocabulary = tokenizers.models.WordLevel({"a": 0, "no": 3, "yes": 7}, unk_token="a")
    tokenizers.Tokenizer(vocabulary).save(str(path / "tokenizer.json"))
    source = resolve(str(path))
    head = head_of(source, *model_of(source), "classify")
    assert head is not None
    assert head.token_ids == (7, 3)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(path / "tokenizer.json"))
    with pytest.raises(ModelError, match="its tokenizer must have the tokens 'yes' and 'no'"):
        head_of(source, *model_of(source), "classify")


@pytest.mark.real
def test_yes_and_no_of_a_gguf_file() -> None:
    source = resolve("smollm2-135m-instruct")
    head = head_of(source, *model_of(source), "classify")
    tokenizer = load_tokenizer(source)
    assert head is not None
    assert tokenizer is not None
    assert [tokenizer.decode([token]) for token in head.token_ids] == ["yes", "no"]


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        ("bert", "auto", "embed"),
        ("bert-classifier", "auto", "classify"),
        ("bert-classifier", "embed", "embed"),
        ("qwen3", "auto", None),
        ("qwen3", "generate", None),
        ("qwen3", "embed", "embed"),
    ],
)
def test_task(name: str, task: str, expected: str | None) -> None:
    source = resolve(str(GOLDEN / name))
    head = head_of(source, *model_of(source), task)
    assert (head and head.task) == expected


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("bert", "generate", "task: a bert model cannot generate; use embed or classify"),
        ("bert", "classify", r"task: config\.json's architectures are \['BertModel'\]"),
        ("qwen3", "classify", r"task: to classify by yes and no a tokenizer\.json is needed"),
    ],
)
def test_a_task_beyond_the_model(name: str, task: str, message: str) -> None:
    source = resolve(str(GOLDEN / name))
    with pytest.raises(ModelError, match=message):
        head_of(source, *model_of(source), task)


@pytest.mark.parametrize(
    ("fields", "labels", "activation"),
    [
        ({"id2label": {"1": "b", "0": "a", "10": "d", "2": "c"}}, ("a", "b", "c", "d"), "softmax"),
        ({"id2label": None}, ("LABEL_0", "LABEL_1"), "softmax"),
        ({"problem_type": "regression"}, ("LABEL_0",), "identity"),
        ({"problem_type": "multi_label_classification", "id2label": {"0": "a", "1": "b"}}, ("a", "b"), "sigmoid"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, ("LABEL_0",), "identity"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, ("LABEL_0",), "identity"),
    ],
)
def test_labels_and_activation(tmp_path: Path, fields: Any, labels: tuple[str, ...], activation: str) -> None:
    source = resolve(str(copied("bert-classifier", tmp_path, **fields)))
    head = head_of(source, *model_of(source))
    assert head is not None
    assert (head.labels, head.activation) == (labels, activation)


def test_activations() -> None:
    logits = np.array([[-1000.0, 0.0], [1.0, 1000.0]], np.float32)
    np.testing.assert_allclose(activate(logits, "sigmoid"), [[0, 0.5], [0.73105858, 1]], atol=1e-6)
    np.testing.assert_allclose(activate(logits, "softmax"), [[0, 1], [0, 1]], atol=1e-6)
    np.testing.assert_array_equal(activate(logits, "identity"), logits)
    with pytest.raises(ValueError, match="activation: expected one of sigmoid, softmax, identity, got 'relu'"):
        activate(logits, "relu")
