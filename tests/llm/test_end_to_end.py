"""`LLM` on real engines: the small golden checkpoints, and the two embedded models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjengine.models
from pjengine import LLM, ConfigError, InvalidRequest, SamplingParams
from pjengine.step_inputs import packed_inputs
from tests.helpers import GOLDEN, load_golden, relative_error, split_rows

SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 32}
PROMPTS = [[5, 6, 7], [9] * 20, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]


@pytest.fixture(scope="module")
def llama() -> LLM:
    return LLM(str(GOLDEN / "llama"), dtype="float32", **SMALL)


def test_greedy_tokens_are_the_models_argmax(llama: LLM) -> None:
    model, params, config = pjengine.models.load(str(GOLDEN / "llama"), dtype="float32")

    @jax.jit
    def logits(inputs):
        return model.logits(params, model.forward(params, inputs, None, config)[0], config)

    options = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for result in llama.generate(PROMPTS, options, use_tqdm=False):
        generated = result.outputs[0].token_ids
        assert len(generated) == 8
        tokens = [*result.prompt_token_ids, *generated]
        predicted = np.asarray(jnp.argmax(logits(packed_inputs([tokens], backend="reference")), axis=-1))
        assert generated == predicted[len(result.prompt_token_ids) - 1 : -1].tolist()


def test_logprobs_are_those_of_the_golden_logits(llama: LLM) -> None:
    golden, _ = load_golden("llama")
    rows = split_rows(golden["tokens"], golden["starts"])
    expected = np.asarray(jax.nn.log_softmax(golden["logits"].astype(np.float32), axis=-1))
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=3, prompt_logprobs=1, ignore_eos=True)
    start = 0
    # Twice: the second time the prompts' pages are in the prefix cache.
    results = [llama.generate(rows, params, use_tqdm=False) for _ in range(2)]
    assert [r.prompt_logprobs for r in results[0]] == [r.prompt_logprobs for r in results[1]]
    for row, result in zip(rows, results[1], strict=True):
        wanted = expected[start : start + len(row)]
        start += len(row)
        assert result.prompt_logprobs is not None
        assert result.prompt_logprobs[0] is None
        got = [entry.token for entry in result.prompt_logprobs[1:] if entry is not None]
        np.testing.assert_allclose(got, [wanted[i, token] for i, token in enumerate(row[1:])], atol=2e-3)
        assert result.outputs[0].logprobs is not None
        (chosen,) = result.outputs[0].logprobs
        assert chosen.rank == 1
        assert chosen.top[0] == (result.outputs[0].token_ids[0], chosen.token)
        np.testing.assert_allclose([p for _, p in chosen.top], np.sort(wanted[-1])[::-1][:3], atol=2e-3)


def test_embeddings_of_a_bare_encoder() -> None:
    golden, _ = load_golden("bert")
    rows = split_rows(golden["tokens"], golden["starts"])
    with LLM(str(GOLDEN / "bert"), dtype="float32", max_num_batched_tokens=256) as llm:
        results = llm.embed(rows, use_tqdm=False)
        assert [r.prompt_token_ids for r in results] == rows
        again = llm.embed(rows[::-1], use_tqdm=False)[::-1]
        with pytest.raises(ConfigError, match="cannot generate; use embed"):
            llm.generate(rows, use_tqdm=False)
    for one, other in zip(results, again, strict=True):
        assert one.embedding.dtype == np.float32
        np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-5)
        assert np.linalg.norm(one.embedding) == pytest.approx(1, abs=1e-5)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def qwen3_embedding(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A sentence-transformers directory around a decoder; untied, its checkpoint lacks the lm_head that it declares."""
    shutil.copyfile(GOLDEN / "qwen3-embedding" / "model.safetensors", tmp_path / "model.safetensors")
    config = json.loads((GOLDEN / "qwen3-embedding" / "config.json").read_text())
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()]
    (tmp_path / "1_Pooling").mkdir()
    for name, content in {
        "config.json": {**config, "tie_word_embeddings": request.param},
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": 64, "pooling_mode_lasttoken": True},
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_decoder_with_sentence_transformers_files_embeds(qwen3_embedding: Path) -> None:
    golden, _ = load_golden("qwen3-embedding")
    last = golden["hidden"][golden["starts"][1:] - 1]
    expected = last / np.linalg.norm(last, axis=-1, keepdims=True)
    rows = split_rows(golden["tokens"], golden["starts"])
    with LLM(str(qwen3_embedding), dtype="float32", max_num_batched_tokens=256) as llm:
        vectors = np.stack([result.embedding for result in llm.embed(rows, use_tqdm=False)])
        short = np.stack([result.embedding for result in llm.embed(rows, use_tqdm=False, dimensions=16)])
        with pytest.raises(InvalidRequest, match=r"dimensions: 65, but the embeddings of .* have 64 elements"):
            llm.embed(rows, use_tqdm=False, dimensions=65)
        with pytest.raises(ConfigError, match="cannot generate; use embed"):
            llm.generate(rows, use_tqdm=False)
    assert relative_error(vectors, expected) < 1e-4
    front = expected[:, :16]
    assert relative_error(short, front / np.linalg.norm(front, axis=-1, keepdims=True)) < 1e-4


@pytest.mark.real
def test_smollm2_answers_a_question() -> None:
    with LLM("smollm2-135m-instruct") as llm:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        (result,) = llm.chat(question, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        assert result.outputs[0].text == "The capital of France is Paris."
        assert result.outputs[0].finish_reason == "stop"
        banned = SamplingParams(temperature=0, max_tokens=16, bad_words=("Paris",))
        assert "Paris" not in llm.chat(question, banned, use_tqdm=False)[0].outputs[0].text


@pytest.mark.real
def test_minilm_embeddings_are_those_of_sentence_transformers() -> None:
    golden, metadata = load_golden("all-minilm-l6-v2")
    with LLM("all-minilm-l6-v2") as llm:
        rows = split_rows(golden["tokens"], golden["starts"])
        results = llm.embed(rows, use_tqdm=False)
        short = [i for i, row in enumerate(rows) if len(row) < 256]
        from_text = llm.embed([metadata["texts"][i] for i in short], use_tqdm=False)
    assert [r.prompt_token_ids for r in from_text] == [rows[i] for i in short]
    assert relative_error(np.stack([r.embedding for r in results]), golden["embeddings"]) < 1e-3
