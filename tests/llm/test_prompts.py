"""What `LLM` and the server share in making requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from pjengine import InvalidRequest, SamplingParams
from pjengine.engine_info import EngineInfo
from pjengine.models.sentence_files import SentenceFiles
from pjengine.prompts import bad_words_token_ids, default_params, engine_params, fit_window, with_prompt
from pjengine.request_checks import check_max_tokens, check_prompt
from pjengine.tokenizer import Tokenizer
from tests.llm.conftest import write_tokenizer

INFO = EngineInfo(model="m", kind="generate", vocab_size=100, max_model_len=10)
EMBED = EngineInfo(model="m", kind="embed", vocab_size=100, max_model_len=10)


@pytest.fixture
def letters(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path)
    return Tokenizer.from_directory(tmp_path)


@pytest.fixture
def words() -> Tokenizer:
    """Knows "cat" and " cat" as one token each, " dog" only with its space apart."""
    vocab = {c: i for i, c in enumerate("catdogĠ")} | {"ca": 10, "cat": 11, "Ġcat": 12}
    backend = Backend(models.BPE(vocab=vocab, merges=[("c", "a"), ("ca", "t"), ("Ġ", "cat")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {})


def test_a_prompt_may_fill_the_window_but_for_one_generated_token() -> None:
    check_prompt([1] * 9, INFO)
    check_prompt([1] * 10, EMBED)
    for info in (INFO, EMBED):
        with pytest.raises(InvalidRequest, match="window of 10") as caught:
            check_prompt([1] * (10 if info is INFO else 11), info, field="messages")
        assert (caught.value.field, caught.value.code) == ("messages", "context_length_exceeded")


@pytest.mark.parametrize("token", [-1, 100, 2**40])
def test_token_ids_outside_the_vocabulary(token: int) -> None:
    check_prompt([0, 99], INFO)
    with pytest.raises(InvalidRequest, match=f"token id {token} is outside the vocabulary, 0..99") as caught:
        check_prompt([1, token], INFO)
    assert caught.value.code == "token_id_out_of_range"


def test_max_tokens_past_the_window() -> None:
    check_max_tokens(SamplingParams(max_tokens=6), 4, INFO)
    check_max_tokens(SamplingParams(max_tokens=None), 4, INFO)
    with pytest.raises(InvalidRequest, match="ask for at most 6") as caught:
        check_max_tokens(SamplingParams(max_tokens=7), 4, INFO, field="max_completion_tokens")
    assert caught.value.field == "max_completion_tokens"


def test_fit_window_cuts_what_leads_past_it() -> None:
    fits = SamplingParams(max_tokens=6, min_tokens=6)
    assert fit_window(fits, 4, INFO) is fits
    cut = fit_window(SamplingParams(max_tokens=20, min_tokens=7, seed=3), 4, INFO)
    assert cut == SamplingParams(max_tokens=6, min_tokens=6, seed=3)
    open_end = SamplingParams(max_tokens=None)
    assert fit_window(open_end, 4, INFO) is open_end


def test_given_fields_come_before_the_models_defaults() -> None:
    params = default_params({"temperature": 0.6, "top_p": 0.9}, temperature=0.0, top_p=None, n=2)
    assert params == SamplingParams(temperature=0.0, top_p=0.9, n=2)


def test_bad_words_in_both_forms(words: Tokenizer) -> None:
    assert bad_words_token_ids(["cat"], words) == ((11,), (12,))
    # " dog" is a space and then "dog": no other form of the word.
    assert bad_words_token_ids(["dog"], words) == (tuple(words.encode("dog")),)
    assert bad_words_token_ids([" cat", "cat"], words) == ((11,), (12,))


def test_bad_words_reach_the_engine_as_ids(letters: Tokenizer) -> None:
    params = SamplingParams(bad_words=("ab",), bad_words_token_ids=((7,),))
    assert engine_params(params, INFO, letters).bad_words_token_ids == ((7,), (1, 2))
    plain = SamplingParams(logit_bias={99: 1.0}, stop=("x",))
    assert engine_params(plain, INFO, letters) is plain


def test_bad_words_without_tokens_are_refused(letters: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"bad_words: ' ' has no tokens") as caught:
        engine_params(SamplingParams(bad_words=(" ",)), INFO, letters)
    assert caught.value.field == "bad_words"


QUERY = SentenceFiles(prompts={"query": "find: ", "document": ""}, default_prompt=None)
DEFAULT = SentenceFiles(prompts={"query": "find: "}, default_prompt="query")


@pytest.mark.parametrize(
    ("sentence", "name", "expected"),
    [
        (QUERY, None, ["a", [1]]),
        (DEFAULT, None, ["find: a", [1]]),
        (DEFAULT, "", ["a", [1]]),
        (SentenceFiles(), None, ["a", [1]]),
    ],
)
def test_the_models_own_prompts(sentence: SentenceFiles, name: str | None, expected: list[object]) -> None:
    """Token ids are taken as they are."""
    assert with_prompt(["a", [1]], sentence, name) == expected


def test_a_named_prompt() -> None:
    assert with_prompt(["a", "b"], QUERY, "query") == ["find: a", "find: b"]
    assert with_prompt(["a", "b"], QUERY, "document") == ["a", "b"]
    for sentence, message in ((QUERY, "known are query, document"), (SentenceFiles(), "it has none")):
        with pytest.raises(InvalidRequest, match=f"prompt_name: the model has no prompt 'passage'; {message}"):
            with_prompt(["a"], sentence, "passage")
    unnamed: tuple[Any, ...] = (["query"], {}, 5)
    for wrong in unnamed:
        with pytest.raises(InvalidRequest, match="prompt_name: expected a string, got"):
            with_prompt(["a"], QUERY, wrong)
    with pytest.raises(InvalidRequest, match="prompt_name: token ids take none"):
        with_prompt(["a", [1]], QUERY, "query")
