"""The server as users start it, on SmolLM2 in float32 on the CPU, through the openai client."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.serving.live_server import SMOLLM_ENGINE, LiveServer, running, wait_for

pytestmark = pytest.mark.real

MODEL = "smollm2-135m-instruct"
COMMAND = ["-m", "pjengine", "serve", MODEL, "--port", "0", *SMOLLM_ENGINE]
FRANCE: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


@pytest.fixture(scope="module")
def smollm() -> Iterator[LiveServer]:
    with running(COMMAND, seconds=180) as live:
        yield live


def answer_of(client: openai.OpenAI, content: str, stream: bool, max_tokens: int, **extra: Any) -> str:
    messages: list[Any] = [{"role": "user", "content": content}]
    arguments: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    if not stream:
        return client.chat.completions.create(**arguments, extra_body=extra).choices[0].message.content or ""
    chunks = client.chat.completions.create(**arguments, extra_body=extra, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_chat_streamed_equals_whole(smollm: LiveServer) -> None:
    client = smollm.client()
    whole = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=30)
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=30, stream=True)
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_64_concurrent_streams_equal_one_by_one(smollm: LiveServer) -> None:
    """The two rounds share no cached pages: they come under different salts."""
    questions = [
        f"Write a short story about {i} {animal}s." for animal in ("cat", "dog", "owl", "fox") for i in range(16)
    ]
    client = smollm.client()

    def ask(salt: str, question: str) -> str:
        return answer_of(client, question, stream=True, max_tokens=8, cache_salt=salt)

    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda question: ask("together", question), questions))
    alone = [ask("alone", question) for question in questions]
    assert together == alone
    assert len(set(together)) > 8
    found = smollm.wait_idle()
    assert found["pjengine_requests_running"] == found["pjengine_requests_waiting"] == 0
    assert found["pjengine_kv_cache_used_pages"] == 0
    assert found["pjengine_kv_cache_reusable_pages"] > 0
    assert found["pjengine_prefix_cache_hit_tokens_total"] > 0


def test_prefix_cache_is_counted(smollm: LiveServer) -> None:
    client = smollm.client()
    messages: list[Any] = [{"role": "user", "content": "Count to a hundred. " * 12}]
    first, second = (
        client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2, temperature=0).usage
        for _ in range(2)
    )
    assert first is not None
    assert second is not None
    assert second.prompt_tokens_details is not None
    assert second.prompt_tokens_details.cached_tokens is not None
    assert second.prompt_tokens_details.cached_tokens >= 64
    assert second.prompt_tokens == first.prompt_tokens


def test_n_and_seed(smollm: LiveServer) -> None:
    client = smollm.client()

    def sample(seed: int) -> list[str]:
        answer = client.chat.completions.create(
            model=MODEL, messages=FRANCE, n=3, seed=seed, temperature=1.5, max_tokens=12
        )
        return [choice.message.content or "" for choice in answer.choices]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert len(set(sample(1))) > 1


def test_stop_string_frees_the_sequence(smollm: LiveServer) -> None:
    client = smollm.client()
    answer = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, stop=" Paris")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content is not None
    assert answer.choices[0].message.content.endswith("is")
    smollm.wait_idle()


def test_chat_logprobs(smollm: LiveServer) -> None:
    answer = smollm.client().chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    for entry in content:
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (entry.token, entry.logprob)
        assert len(entry.top_logprobs) == 3
        assert entry.logprob <= 0


def test_completions_score_what_they_generated(smollm: LiveServer) -> None:
    """Echoed, generated tokens have the log-probabilities that they had when generated."""
    client = smollm.client()
    generated = client.completions.create(model=MODEL, prompt="The sky is", max_tokens=6, temperature=0, logprobs=2)
    text = generated.choices[0].text
    scored = client.completions.create(model=MODEL, prompt="The sky is" + text, max_tokens=0, echo=True, logprobs=2)
    assert scored.choices[0].text == "The sky is" + text
    assert scored.choices[0].logprobs is not None
    assert generated.choices[0].logprobs is not None
    found: list[Any] = scored.choices[0].logprobs.token_logprobs or []
    assert found[0] is None
    assert found[-6:] == pytest.approx(generated.choices[0].logprobs.token_logprobs, abs=1e-3)


def test_completions_of_text_and_ids(smollm: LiveServer) -> None:
    client = smollm.client()
    texts = ["The sky is", "One, two, three,"]
    ids = [smollm.post("/tokenize", {"prompt": text}).json()["tokens"] for text in texts]
    by_text = client.completions.create(model=MODEL, prompt=texts, max_tokens=6, temperature=0)
    by_ids = client.completions.create(model=MODEL, prompt=ids, max_tokens=6, temperature=0)
    assert [choice.text for choice in by_text.choices] == [choice.text for choice in by_ids.choices]
    chunks = client.completions.create(model=MODEL, prompt=texts, max_tokens=6, temperature=0, stream=True)
    found = ["", ""]
    for chunk in chunks:
        found[chunk.choices[0].index] += chunk.choices[0].text
    assert found == [choice.text for choice in by_text.choices]
    assert "four" in found[1]


def test_bad_words_and_logit_bias(smollm: LiveServer) -> None:
    client = smollm.client()
    arguments: dict[str, Any] = {
        "model": MODEL,
        "prompt": "The capital of France is",
        "max_tokens": 4,
        "temperature": 0,
    }
    text = client.completions.create(**arguments).choices[0].text
    assert "Paris" in text
    assert "Paris" not in client.completions.create(**arguments, extra_body={"bad_words": ["Paris"]}).choices[0].text
    token = smollm.post("/tokenize", {"prompt": " London"}).json()["tokens"][0]
    biased = client.completions.create(**{**arguments, "max_tokens": 1}, logit_bias={str(token): 100})
    assert biased.choices[0].text == smollm.post("/detokenize", {"tokens": [token]}).json()["prompt"]


def test_detokenize_gives_the_text_back(smollm: LiveServer) -> None:
    text = "naïve café 日本 🙂 <|im_start|>"
    tokens = smollm.post("/tokenize", {"prompt": text}).json()["tokens"]
    assert smollm.post("/detokenize", {"tokens": tokens}).json()["prompt"] == text


def test_a_prompt_longer_than_the_window(smollm: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError, match="window of 512"):
        answer_of(smollm.client(), "word " * 600, stream=False, max_tokens=5)


def test_a_client_that_leaves(smollm: LiveServer) -> None:
    stream = smollm.client().chat.completions.create(
        model=MODEL, messages=FRANCE, n=2, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    wait_for(lambda: smollm.metrics()["pjengine_requests_running"] == 2)
    generated = smollm.metrics()["pjengine_generation_tokens_total"]
    stream.close()
    found = smollm.wait_idle(5)
    assert found["pjengine_generation_tokens_total"] - generated < 200  # of the 800 that it would have been


def eight_streams(live: LiveServer, pool: ThreadPoolExecutor) -> list[Future[str]]:
    """Open chats of 40 tokens each, all of them running."""

    def stream(i: int) -> str:
        return answer_of(live.client(), f"Count from {i}", stream=True, max_tokens=40, ignore_eos=True)

    futures = [pool.submit(stream, i) for i in range(8)]
    wait_for(lambda: live.metrics()["pjengine_requests_running"] == 8)
    return futures


def test_kill_9_of_the_engine_under_load() -> None:
    """Every open stream ends with an error, health turns 503, the exit code is 1."""
    with running(COMMAND, seconds=180) as live, ThreadPoolExecutor(8) as pool:
        futures = eight_streams(live, pool)
        os.kill(live.engine_pid(), signal.SIGKILL)
        wait_for(lambda: live.get("/health").status_code == 503, 2)
        assert all(isinstance(future.exception(10), openai.APIError) for future in futures)
        assert live.process.wait(15) == 1


def test_sigterm_under_load(smollm: LiveServer) -> None:
    """The last test of the shared server: running streams finish, new ones are refused, the exit code is 0."""
    with ThreadPoolExecutor(8) as pool:
        futures = eight_streams(smollm, pool)
        smollm.process.send_signal(signal.SIGTERM)
        wait_for(lambda: smollm.get("/health").status_code == 503, 2)
        assert smollm.post("/v1/completions", {"prompt": "a"}).status_code == 503
        assert all(future.result(60) for future in futures)
    assert smollm.process.wait(15) == 0
    assert "Traceback" not in smollm.log
