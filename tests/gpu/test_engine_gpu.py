"""The engine and whole models on the GPU, with the kernels that serve them there."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.config import EngineConfig
from pjengine.engine import Engine
from pjengine.errors import ModelError
from pjengine.factory import make_engine
from pjengine.models import llama
from pjengine.models.embedded import fetch
from pjengine.models.loading import load
from pjengine.models.params import init_params
from pjengine.request import Request
from pjengine.sampling_params import SamplingParams
from pjengine.step_inputs import KVCache, StepInputs, packed_inputs
from tests.helpers import PagedSequences, load_golden, relative_error, split_rows

pytestmark = pytest.mark.gpu

LLAMA_8B = Path(__file__).parents[2] / "benchmarks" / "llama-3.1-8b"
SMOLLM2 = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def smollm2() -> str:
    """The model's name, where it is cached or can be fetched."""
    try:
        fetch(SMOLLM2)
    except ModelError as error:
        pytest.skip(f"SmolLM2 is not at hand: {error}")
    return SMOLLM2


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    for i, prompt in enumerate(prompts):
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    texts: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            texts[int(output.request_id)] += output.token_ids
    engine.check_integrity()
    return texts


def test_smollm2_greedy_text_in_float32(smollm2: str) -> None:
    """Through the whole engine: transformers' text up to the first step without a clear margin."""
    golden, _ = load_golden(SMOLLM2)
    expected = split_rows(golden["tokens"], golden["starts"])
    prompts = [row[:n] for row, n in zip(expected, golden["prompt_lens"], strict=True)]
    config = EngineConfig.make(
        smollm2, dtype="float32", max_num_seqs=8, max_num_batched_tokens=256, max_model_len=1024, num_pages=256
    )
    engine = make_engine(config, progress=False)
    assert isinstance(engine, Engine)
    texts = run(engine, prompts, SamplingParams(max_tokens=64, temperature=0, ignore_eos=True))
    margins = golden["top_logits"][..., 0] - golden["top_logits"][..., 1]
    for prompt, text, want, unclear in zip(prompts, texts, expected, margins < 1e-3, strict=True):
        end = int(np.argmax(unclear)) if unclear.any() else 64
        assert text[:end] == want[len(prompt) : len(prompt) + end]


@pytest.mark.parametrize("decode", [False, True], ids=["chunks", "decode"])
def test_smollm2_logits_in_bfloat16(smollm2: str, decode: bool) -> None:
    """Over shuffled pages full of NaN, with the kernels: 3 query heads per KV head, head size 64."""
    model, params, config = load(smollm2, dtype="bfloat16")
    golden, _ = load_golden(SMOLLM2)
    rows = split_rows(golden["tokens"], golden["starts"])

    @functools.partial(jax.jit, donate_argnums=2)
    def hidden_states(params: Any, inputs: StepInputs, cache: KVCache) -> tuple[jax.Array, KVCache | None]:
        return model.forward(params, inputs, cache, config)

    sequences = PagedSequences(rows, model.cache_specs(config), "bfloat16", page_size=64)
    chunks, tokens = ([1] * 8, 8) if decode else ([5, 16, 33, 64, 1, 7, 100, 30], 256)
    hidden = sequences.run(functools.partial(hidden_states, params), chunks, tokens, decode=decode)
    first = golden["starts"][:-1] + golden["prompt_lens"] - 1
    chosen = (first[:, None] + np.arange(64)).ravel()
    logits = np.asarray(jax.jit(model.logits, static_argnums=2)(params, jnp.asarray(hidden[chosen]), config))
    assert relative_error(logits[:, golden["columns"]].reshape(golden["logits"].shape), golden["logits"]) < 3e-2


@pytest.fixture(scope="module")
def llama_8b() -> Engine:
    config = EngineConfig.make(
        str(LLAMA_8B),
        load_format="dummy",
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        max_model_len=4096,
        num_pages=1024,
        enable_prefix_caching=False,  # a second run would compute its prompts in other pieces, rounded otherwise
    )
    engine = make_engine(config, progress=False)
    assert isinstance(engine, Engine)
    return engine


def test_llama_8b_serves_64_requests_at_once(llama_8b: Engine) -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 128_000, n).tolist() for n in random.integers(1, 700, 64)]
    params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
    texts = run(llama_8b, prompts, params)
    assert [len(text) for text in texts] == [48] * 64
    assert run(llama_8b, prompts, params) == texts
    assert llama_8b.stats().used_pages == 0


@pytest.mark.parametrize("layers", [4, 32])
def test_llama_8b_against_float32(layers: int) -> None:
    """64 ragged sequences: prompts in chunks over pages, then one decode step each, in bf16 with the kernels, against
    float32 without a cache. Random layers each add their rounding: what bf16 itself is off by grows with the root
    of their number, so the yardstick is the reference in bf16, and 3e-2 for few layers.
    """
    config = llama.Config.from_hf(json.loads((LLAMA_8B / "config.json").read_text()))
    config = dataclasses.replace(config, num_layers=layers, windows=(None,) * layers)
    params = init_params(llama.param_specs(config), "bfloat16", seed=1)
    random = np.random.default_rng(1)
    rows = [random.integers(0, 128_000, n).tolist() for n in random.integers(1, 200, 64)]
    chunk = 101

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params: Any, inputs: StepInputs, cache: KVCache) -> tuple[jax.Array, KVCache | None]:
        return llama.forward(params, inputs, cache, config)

    sequences = PagedSequences(rows, llama.cache_specs(config), "bfloat16", page_size=64)
    cache = sequences.cache
    for start in range(0, 200, chunk):
        spans = [(min(start, len(row) - 1), min(start + chunk, len(row) - 1)) for row in rows]
        _, cache = step(params, sequences.inputs(spans, 8192), cache)
    spans = [(len(row) - 1, len(row)) for row in rows]
    hidden, _ = step(params, sequences.inputs(spans, 64, decode=True), cache)
    logits = llama.logits(params, hidden, config)

    def without_cache(params: Any) -> jax.Array:
        """Not under one jit: the layers then share one executable, compiled once."""
        inputs = packed_inputs(rows, backend="reference")
        hidden, _ = llama.forward(params, inputs, None, config)
        return llama.logits(params, hidden[inputs.last_tokens], config)

    narrow = without_cache(params)
    expected = without_cache(jax.tree.map(lambda x: x.astype(jnp.float32), params))
    error = relative_error(logits, expected)
    assert error < 1.2 * relative_error(narrow, expected)
    assert layers > 4 or error < 3e-2
