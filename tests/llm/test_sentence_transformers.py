"""Directories as sentence-transformers saves them: from texts to what it makes of them (scripts/make_golden.py)."""

from __future__ import annotations

import numpy as np
import pytest

from pjengine import LLM, InvalidRequest
from pjengine.activations import activate
from pjengine.config import EngineConfig
from pjengine.factory import make_engine
from pjengine.models.sources import resolve
from pjengine.pairs import PairEncoder
from pjengine.request import Request
from pjengine.tokenizer import load_tokenizer
from tests.helpers import GOLDEN, load_golden, relative_error


def test_an_embedder_with_prompts_and_dense_layers() -> None:
    golden, metadata = load_golden("sentence-transformer")
    texts = metadata["texts"]
    with LLM(str(GOLDEN / "sentence-transformer"), dtype="float32", max_num_batched_tokens=128) as llm:
        results = llm.embed(texts, use_tqdm=False) + llm.embed(texts, use_tqdm=False, prompt_name="document")
        with pytest.raises(
            InvalidRequest, match="prompt_name: the model has no prompt 'web'; known are document, query"
        ):
            llm.embed(texts, use_tqdm=False, prompt_name="web")
        with pytest.raises(InvalidRequest, match="the model's window of 48 has room for 48"):  # as its tokenizer says
            llm.embed("a" * 60, use_tqdm=False)
    assert relative_error([result.embedding for result in results], golden["embeddings"]) < 1e-4


@pytest.mark.parametrize("name", ["cross-encoder", "reranker"])
def test_scores_of_pairs(name: str) -> None:
    golden, metadata = load_golden(name)
    path = str(GOLDEN / name)
    engine = make_engine(EngineConfig(model=path, dtype="float32", max_num_batched_tokens=128, compile_cache=""))
    source = resolve(path)
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    pairs = PairEncoder(source, tokenizer, engine.info).encode(metadata["query"], metadata["texts"])
    for i, pair in enumerate(pairs):
        engine.add(Request(request_id=str(i), prompt_token_ids=pair.token_ids, token_type_ids=pair.token_type_ids))
    logits: dict[int, np.ndarray] = {}
    while engine.has_work:
        logits |= {int(o.request_id): np.frombuffer(o.logits or b"", "<f4") for o in engine.step()}
    scores = activate(np.stack([logits[i] for i in range(len(pairs))]), engine.info.activation)
    assert scores.shape == (len(pairs), 1)
    assert relative_error(scores[:, 0], golden["scores"]) < 1e-4
