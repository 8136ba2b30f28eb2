"""The engine on small real checkpoints: crowds, few pages and preemption change no token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pjengine.config import EngineConfig
from pjengine.engine import Engine
from pjengine.errors import ConfigError, InvalidRequest, OutOfMemory
from pjengine.factory import make_engine
from pjengine.request import Output, Request
from pjengine.sampling_params import SamplingParams

GOLDEN = Path(__file__).parent.parent / "golden"


def engine(model: str, **options: object) -> Engine:
    base = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "page_size": 16}
    made = make_engine(EngineConfig.make(str(GOLDEN / model), **(base | options)), progress=False)
    assert isinstance(made, Engine)
    return made


@pytest.fixture(scope="module")
def llama() -> Engine:
    return engine("llama")


def run(made: Engine, requests: list[tuple[list[int], SamplingParams]]) -> dict[tuple[int, int], list[Output]]:
    """Outputs by (request, index), all requests at once."""
    for i, (prompt, params) in enumerate(requests):
        made.add(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    outputs: dict[tuple[int, int], list[Output]] = {}
    while made.has_work:
        for output in made.step():
            outputs.setdefault((int(output.request_id), output.index), []).append(output)
    made.check_integrity()
    assert made.stats().used_pages == 0
    return outputs


def tokens(outputs: dict[tuple[int, int], list[Output]]) -> dict[tuple[int, int], list[int]]:
    return {key: [t for output in found for t in output.token_ids] for key, found in outputs.items()}


def workload(vocab: int, count: int = 12) -> list[tuple[list[int], SamplingParams]]:
    random = np.random.default_rng(0)
    shared = random.integers(0, vocab, 40).tolist()
    requests = []
    for i in range(count):
        prompt = shared[: random.integers(0, 40)] + random.integers(0, vocab, random.integers(1, 60)).tolist()
        params = SamplingParams(
            max_tokens=int(random.integers(1, 40)),
            temperature=0.0 if i % 2 else 1.0,
            seed=i,
            n=2 if i % 5 == 0 else 1,
            presence_penalty=0.5 if i % 3 == 0 else 0.0,
            repetition_penalty=1.2 if i % 4 == 0 else 1.0,
            top_k=(0, 5, 100)[i % 3],
            top_p=0.8 if i % 4 == 2 else 1.0,
            min_p=0.01 if i % 5 == 2 else 0.0,
            logit_bias={7: 5.0} if i == 4 else None,
            logprobs=3 if i == 8 else None,
        )
        requests.append((prompt, params))
    return requests


@pytest.mark.parametrize("model", ["llama", "mistral"])
def test_a_crowd_with_few_pages_gets_the_texts_it_would_get_alone(model: str) -> None:
    """mistral's window is shorter than the prompts: its pages come and go while a sequence runs."""
    roomy = engine(model)
    requests = workload(roomy.info.vocab_size)
    alone = {}
    for i, request in enumerate(requests):
        for (_, index), text in tokens(run(roomy, [request])).items():
            alone[i, index] = text
    crowded = engine(model, num_pages=14 if model == "llama" else 10)
    assert tokens(run(crowded, requests)) == alone
    assert crowded.stats().preemptions > 0
    assert crowded.stats().padded_tokens >= crowded.stats().step_tokens > 0
    assert tokens(run(engine(model, enable_prefix_caching=False), requests)) == alone


def test_logprobs_of_prompt_and_output_are_one_distribution() -> None:
    """Prompt log-probabilities of a generated text, in chunks, equal those reported while it was generated."""
    made = engine("llama", max_num_batched_tokens=16)
    prompt = list(range(40, 75))
    first = run(made, [(prompt, SamplingParams(max_tokens=20, temperature=0, logprobs=5, ignore_eos=True))])[0, 0]
    generated = [t for output in first for t in output.token_ids]
    reported = [entry for output in first for entry in output.logprobs or []]
    again = run(made, [(prompt + generated, SamplingParams(max_tokens=1, prompt_logprobs=5))])[0, 0]
    found = again[0].prompt_logprobs
    assert found is not None
    assert found[0] is None
    assert len(found) == len(prompt) + len(generated)
    for expected, entry in zip(reported, found[len(prompt) :], strict=True):
        assert entry is not None
        assert entry.token == pytest.approx(expected.token, abs=1e-4)
        assert entry.rank == expected.rank == 1
        assert [t for t, _ in entry.top] == [t for t, _ in expected.top]
        assert len(entry.top) == 5


def test_parameters_reach_the_tokens(llama: Engine) -> None:
    made = llama
    prompt = [5, 6, 7]

    def first(**fields: object) -> list[int]:
        options: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | fields
        return tokens(run(made, [(prompt, SamplingParams(**options))]))[0, 0]

    plain = first()
    assert first(logit_bias={9: 100.0}) == [9] * 8
    assert set(first(allowed_token_ids=(3, 4), temperature=1.0)) <= {3, 4}
    assert plain[0] not in first(logit_bias={plain[0]: -100.0})
    assert plain[0] not in first(bad_words_token_ids=((plain[0],),))
    pair = first(bad_words_token_ids=((plain[0], plain[1]),))
    assert pair[0] == plain[0]
    assert pair[1] != plain[1]
    assert len(set(first(logit_bias={9: 50.0, 10: 49.9}, frequency_penalty=1.0))) == 2
    stopped = first(stop_token_ids=(plain[2],))
    assert stopped == plain[: plain.index(plain[2]) + 1]
    late = first(stop_token_ids=(plain[0],), min_tokens=4)
    assert len(late) >= 4
    assert plain[0] not in late[:4]
    assert first(temperature=1.0, top_k=1) == plain
    assert first(temperature=1.0, top_p=1e-6) == plain
    assert first(temperature=1.0, min_p=1.0) == plain
    assert first(temperature=1.0, seed=3) == first(temperature=1.0, seed=3) != first(temperature=1.0, seed=4)


def test_a_request_that_ends_at_eos_says_so(llama: Engine) -> None:
    made = llama
    eos = made.info.eos_token_ids[0]
    outputs = run(made, [([5, 6], SamplingParams(max_tokens=8, logit_bias={eos: 100.0}))])[0, 0]
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].token_ids == [eos]
    timings = outputs[-1].timings
    assert timings is not None
    assert 0 <= timings.queued <= timings.first_token <= timings.finished


def test_an_abort_frees_the_pages_at_once(llama: Engine) -> None:
    made = llama
    made.add(Request(request_id="a", prompt_token_ids=[1, 2, 3], params=SamplingParams(max_tokens=50, n=3)))
    for _ in range(4):
        made.step()
    assert made.stats().running == 3
    made.abort("a", 1)
    assert made.stats().running == 2
    made.abort("a")
    made.abort("a")
    assert made.stats().used_pages == 0
    assert [made.step() for _ in range(3)] == [[], [], []]
    assert not made.has_work


def test_what_cannot_fit_is_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match="max_model_len: expected at most"):
        engine("llama", max_model_len=10**6)
    with pytest.raises(OutOfMemory, match=r"max_model_len: a sequence of .* GiB"):
        engine("llama", max_model_len=128, cpu_kv_bytes=1 << 12)
    few = engine("llama", num_pages=3)
    assert few.info.max_model_len == 32
    with pytest.raises(InvalidRequest, match="window of 32"):
        few.add(Request(request_id="a", prompt_token_ids=[1] * 40, params=SamplingParams(max_tokens=4)))
    outputs = run(few, [([1] * 20, SamplingParams(max_tokens=12, ignore_eos=True)) for _ in range(5)])
    assert all(len(text) == 12 for text in tokens(outputs).values())
