"""`LLM.generate` and `LLM.chat`: what goes in, what comes out, in which order, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest

from pjengine import LLM, ConfigError, EngineDead, InvalidRequest, SamplingParams
from pjengine.outputs import RequestOutput
from tests.core.simulated import EOS, VOCAB, alone
from tests.helpers import GOLDEN
from tests.llm.conftest import LETTERS, MakeLLM

GREEDY = SamplingParams(temperature=0, max_tokens=12)
SPELLED = {token: letter.replace("Ġ", " ") for letter, token in LETTERS.items()}


def ids(text: str) -> list[int]:
    return [LETTERS[letter.replace(" ", "Ġ")] for letter in text]


def text_of(token_ids: list[int]) -> str:
    return "".join(SPELLED[token] for token in token_ids if token != EOS)


def continuation(prompt: str, max_tokens: int = 12) -> list[int]:
    """What the simulated model generates from a prompt that has the device to itself."""
    return alone(ids(prompt), max_tokens, [None])


def generate(llm: LLM, prompts: object, params: object = GREEDY) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]


def test_one_string_gives_one_result(llm: LLM) -> None:
    (result,) = generate(llm, "hello world")
    expected = continuation("hello world")
    assert result.prompt == "hello world"
    assert result.prompt_token_ids == ids("hello world")
    (out,) = result.outputs
    assert (out.index, out.token_ids, out.text) == (0, expected, text_of(expected))
    assert out.finish_reason == ("stop" if expected[-1] == EOS else "length")
    assert out.stop_reason is None
    assert out.logprobs is None
    assert out.error is None


@pytest.mark.parametrize(
    "prompt", [ids("abc"), tuple(ids("abc")), np.array(ids("abc"))], ids=["list", "tuple", "array"]
)
def test_token_ids_are_one_prompt(llm: LLM, prompt: object) -> None:
    (result,) = generate(llm, prompt)
    assert result.prompt is None
    assert result.prompt_token_ids == ids("abc")
    assert all(type(token) is int for token in result.prompt_token_ids)
    assert result.outputs[0].token_ids == continuation("abc")


def test_many_prompts_come_back_in_order(llm: LLM) -> None:
    texts = [f"prompt {letter}" for letter in "qwertyuiopasdfgh"]
    mixed = [text if i % 2 else ids(text) for i, text in enumerate(texts)]
    results = generate(llm, mixed)
    assert [r.prompt for r in results] == [text if i % 2 else None for i, text in enumerate(texts)]
    assert [r.outputs[0].token_ids for r in results] == [continuation(text) for text in texts]


def test_more_prompts_than_may_wait(make_llm: MakeLLM) -> None:
    texts = [f"prompt {letter}" for letter in "qwertyuiopasdfgh"]
    results = generate(make_llm(max_waiting=1), texts)
    assert [r.outputs[0].token_ids for r in results] == [continuation(text) for text in texts]


def test_no_prompts_give_no_results(llm: LLM) -> None:
    assert generate(llm, []) == []


def test_one_sampling_params_each(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 5, 3)]
    results = generate(llm, ["a", "b", "c"], params)
    assert [len(r.outputs[0].token_ids) for r in results] == [1, 5, 3]
    assert [r.outputs[0].finish_reason for r in results] == ["length"] * 3


def test_without_sampling_params_the_models_own_hold(make_llm: MakeLLM) -> None:
    llm = make_llm(generation_config={"temperature": 0})
    (result,) = llm.generate("hello", use_tqdm=False)
    assert result.outputs[0].token_ids == continuation("hello", 16)


def test_n_sequences_by_index(llm: LLM) -> None:
    (result,) = generate(llm, "hello", SamplingParams(n=3, seed=7, max_tokens=6))
    assert [out.index for out in result.outputs] == [0, 1, 2]
    assert len({tuple(out.token_ids) for out in result.outputs}) == 3


def test_generation_ends_at_the_window(llm: LLM) -> None:
    window = 63 * 4  # tokens that the pages hold
    prompt = "a" * (window - 3)
    (result,) = generate(llm, prompt, SamplingParams(temperature=0, max_tokens=50, min_tokens=10, ignore_eos=True))
    assert len(result.outputs[0].token_ids) == 3
    assert result.outputs[0].finish_reason == "length"


def test_stop_string_across_token_borders_ends_the_text(llm: LLM) -> None:
    plain = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    full = generate(llm, "hello", plain)[0].outputs[0]
    spelled = [t for t in full.token_ids if t != EOS]
    stop = text_of(spelled[5:8])
    cut = text_of(spelled)[: text_of(spelled).index(stop)]
    for keep in (False, True):
        stopped = msgspec.structs.replace(plain, stop=(stop,), include_stop_str_in_output=keep)
        (out,) = generate(llm, "hello", stopped)[0].outputs
        assert out.text == cut + (stop if keep else "")
        assert (out.finish_reason, out.stop_reason) == ("stop", stop)
        assert full.token_ids[: len(out.token_ids)] == out.token_ids
        assert len(out.token_ids) < 40
    engine: Any = llm._engine
    engine.check_integrity()


def test_stop_string_ends_only_its_own_sequence(llm: LLM) -> None:
    plain = SamplingParams(n=3, seed=1, max_tokens=30, ignore_eos=True)
    free = generate(llm, "hello", plain)[0].outputs
    stop = free[1].text[3:6]
    assert stop not in free[0].text + free[2].text
    outs = generate(llm, "hello", SamplingParams(n=3, seed=1, max_tokens=30, ignore_eos=True, stop=(stop,)))[0].outputs
    assert [out.finish_reason for out in outs] == ["length", "stop", "length"]
    assert [outs[0], outs[2]] == [free[0], free[2]]
    assert outs[1].text == free[1].text[: free[1].text.index(stop)]


def test_stop_token_is_reported_and_left_out_of_the_text(llm: LLM) -> None:
    expected = [t for t in continuation("hello", 12) if t != EOS]
    stop = expected[4]
    (out,) = generate(llm, "hello", SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(stop,)))[0].outputs
    kept = expected[: expected.index(stop) + 1]
    assert out.token_ids == kept
    assert out.text == text_of(kept[:-1])
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)


def test_timings_are_ordered(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    stop = generate(llm, "hello", params)[0].outputs[0].text[4:7]
    for how in (params, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=(stop,))):
        timings = generate(llm, "hello", how)[0].timings
        assert timings is not None
        assert 0 <= timings.queued <= timings.first_token < timings.finished < 60


def test_cached_tokens_of_a_repeated_prompt(llm: LLM) -> None:
    prompt = "a prompt of several pages"
    assert generate(llm, prompt)[0].cached_tokens == 0
    assert generate(llm, prompt)[0].cached_tokens >= 20


def test_results_are_frozen(llm: LLM) -> None:
    (result,) = generate(llm, "hello")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.prompt = "other"  # type: ignore[misc]


def test_chat_renders_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi there"}]
    (result,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert result.prompt == "user hi there go"
    assert result.outputs[0].token_ids == continuation("user hi there go")


def test_chat_takes_many_conversations(llm: LLM) -> None:
    conversations = [[{"role": "user", "content": text}] for text in ("one", "two")]
    results = llm.chat(conversations, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert [r.prompt for r in results] == ["user one ", "user two "]


def test_without_a_tokenizer_ids_go_in_and_come_out(make_llm: MakeLLM) -> None:
    llm = make_llm(tokenizer=False)
    (result,) = generate(llm, ids("hello"))
    assert result.outputs[0].token_ids == continuation("hello")
    assert result.outputs[0].text == ""
    for refused in ("hello", ["hello", [1, 2]]):
        with pytest.raises(InvalidRequest, match="no tokenizer"):
            generate(llm, refused)
    with pytest.raises(InvalidRequest, match="stop: this model has no tokenizer"):
        generate(llm, [1, 2], SamplingParams(stop=("x",)))
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", r"prompts\[0\]: empty"),
        ([[]], r"prompts\[0\]: empty"),
        (["fine", ""], r"prompts\[1\]: empty"),
        ([1, VOCAB], rf"prompts\[0\]: token id {VOCAB} is outside the vocabulary, 0\.\.{VOCAB - 1}"),
        ([[1], [-1]], r"prompts\[1\]: token id -1"),
        ("a" * 500, r"prompts\[0\]: 500 tokens, but the model's window of 252 has room for 251"),
        ([1, "a"], r"prompts\[0\]: expected a string or token ids"),
        ([True], r"prompts\[0\]: expected"),
        ([[1.5]], r"prompts\[0\]: expected .* got 1.5"),
        ([[1, None]], r"prompts\[0\]: expected .* got None"),
        (None, "prompts: expected"),
        (7, "prompts: expected"),
        (b"bytes", "prompts: expected"),
        (np.array(5), "prompts: expected"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_wrong_prompts_are_refused_by_name(llm: LLM, prompts: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        generate(llm, prompts)
    assert generate(llm, "hello")[0].outputs[0].token_ids == continuation("hello")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([GREEDY], "sampling_params: 1 of them for 2 prompts"),
        ([GREEDY] * 3, "sampling_params: 3 of them for 2 prompts"),
        ({"temperature": 0}, "sampling_params: expected SamplingParams"),
        ([GREEDY, None], "sampling_params: expected SamplingParams, or a list of them, got None"),
        (SamplingParams(logit_bias={VOCAB: 1.0}), "logit_bias: token id"),
        (SamplingParams(allowed_token_ids=(VOCAB,)), "allowed_token_ids: token id"),
        (SamplingParams(stop_token_ids=(VOCAB,)), "stop_token_ids: token id"),
    ],
)
def test_wrong_params_are_refused_by_name(llm: LLM, params: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        generate(llm, ["a", "b"], params)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", 5),
        ("stop", b"a"),
        ("bad_words", 5),
        ("stop_token_ids", 5),
        ("allowed_token_ids", "12"),
        ("bad_words_token_ids", 5),
        ("bad_words_token_ids", [5]),
        ("logit_bias", [5]),
    ],
)
def test_params_of_a_wrong_type_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: expected "):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("messages", [[], [[]], "hi", [["hi"]], [{"role": "user", "content": "hi"}, "hi"]])
def test_wrong_messages_are_refused(llm: LLM, messages: object) -> None:
    if messages == []:
        assert llm.chat([], use_tqdm=False) == []
        return
    with pytest.raises(InvalidRequest, match="messages: expected"):
        llm.chat(messages, use_tqdm=False)  # type: ignore[arg-type]


def test_embedding_with_a_generating_model_is_refused(llm: LLM) -> None:
    with pytest.raises(ConfigError, match='cannot embed; use generate or chat, load it with task "embed"'):
        llm.embed("hello", use_tqdm=False)


def test_unknown_option_is_refused(make_llm: MakeLLM) -> None:
    with pytest.raises(ConfigError, match="max_model_length: unknown engine option"):
        make_llm(max_model_length=5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_num_seqs": "4"}, "max_num_seqs: expected int or None, got '4'"),
        ({"max_num_seqs": 4.5}, "max_num_seqs: expected int or None, got 4.5"),
        ({"max_num_seqs": True}, "max_num_seqs: expected int or None, got True"),
        ({"max_waiting": None}, "max_waiting: expected int, got None"),
        ({"num_pages": 2.5}, "num_pages: expected int or None, got 2.5"),
        ({"page_size": 16.0}, "page_size: expected int or None, got 16.0"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization: expected float or None, got '0.9'"),
        ({"gpu_memory_utilization": math.nan}, "gpu_memory_utilization: expected in "),
        ({"max_wait_ms": math.inf}, "max_wait_ms: expected milliseconds, at least 0, got inf"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching: expected bool, got 'no'"),
        ({"compile_cache": 5}, "compile_cache: expected str or None, got 5"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"eager_buckets": 0}, "eager_buckets: expected at least 1, got 0"),
        ({"max_num_batched_tokens": 10**12}, "max_num_batched_tokens: expected at most 1073741824, got 1000000000000"),
        ({"cpu_kv_bytes": None}, "cpu_kv_bytes: expected int, got None"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(str(GOLDEN / "llama"), **options)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("model", [None, 5, ["a"]])
def test_a_model_is_named_by_a_string(model: Any) -> None:
    with pytest.raises(ConfigError, match="model: expected str, got"):
        LLM(model)


def test_closed_is_closed(make_llm: MakeLLM) -> None:
    with make_llm() as llm:
        generate(llm, "hello")
    for use in (lambda: generate(llm, "hello"), lambda: llm.info, lambda: llm.tokenize(["hello"])):
        with pytest.raises(EngineDead, match="closed"):
            use()
    llm.close()


def test_progress_bar_counts_requests(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b", "c"], GREEDY)
    assert "3/3" in capsys.readouterr().err
    llm.generate(["a", "b", "c"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_results_go_into_json(llm: LLM) -> None:
    """As a batch job writes them."""
    (result,) = generate(llm, "hello")
    assert (
        json.loads(json.dumps([dataclasses.asdict(out) for out in result.outputs]))[0]["text"] == result.outputs[0].text
    )
