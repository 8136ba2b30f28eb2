"""Tokenizers of directories and of GGUF metadata.

token_ids.json was written by transformers 5.23: `AutoTokenizer.from_pretrained(dir, gguf_file=…)` for SmolLM2, of the
directory for MiniLM. For GGUF's pre-tokenizer "smollm" it splits no digits off, though the model was trained so and
llama.cpp does: texts where that matters are listed apart, with the ids that follow from llama.cpp's rule.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from pjengine.errors import InvalidRequest, ModelError
from pjengine.models.sources import resolve
from pjengine.tokenizer import Tokenizer, load_tokenizer
from tests.sources.checkpoints import write_directory
from tests.text.vocabularies import (
    byte_alphabet,
    byte_level_metadata,
    from_metadata,
    sentencepiece_metadata,
    write_tokenizer,
)

GOLDEN = json.loads((Path(__file__).parent / "token_ids.json").read_text("utf-8"))
TINY = from_metadata(byte_level_metadata())


def tokens(tokenizer: Tokenizer, text: str, **options: bool) -> list[str | None]:
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text, **options)]


@pytest.mark.real
@pytest.mark.parametrize("name", GOLDEN)
def test_real_models_tokenise_as_transformers(name: str) -> None:
    tokenizer = load_tokenizer(resolve(name.partition(",")[0]))
    assert tokenizer is not None
    texts, expected = zip(*GOLDEN[name], strict=True)
    assert [tokenizer.encode(text) for text in texts] == list(expected)
    assert tokenizer.encode_batch(texts) == list(expected)
    if "smollm2" in name:  # byte-level: nothing is lost
        assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in expected] == list(texts)


@pytest.mark.real
def test_smollm2_chat_template() -> None:
    tokenizer = load_tokenizer(resolve("smollm2-135m-instruct"))
    assert tokenizer is not None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.vocab_size == 49152
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@given(st.text())
def test_byte_level_round_trip(text: str) -> None:
    assert TINY.decode(TINY.encode(text), skip_special_tokens=False) == text


def test_byte_level_merges_and_special_tokens() -> None:
    assert tokens(TINY, "hello  hello<|end|>") == ["hello", "Ġ", "Ġhello", "<|end|>"]
    assert tokens(TINY, "<think>hell") == ["<think>", "hell"]
    assert TINY.decode(TINY.encode("<think>hello<|end|>")) == "<think>hello"


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["a", "ĠĠ", "1", "2"]),  # digits are split off first, so both spaces stay together
        ("gpt-2", ["a", "Ġ", "Ġ", "1", "2"]),  # the second space belongs to the number
        ("llama-bpe", ["a", "Ġ", "Ġ", "1", "2"]),
        ("qwen2", ["a", "Ġ", "Ġ", "1", "2"]),
    ],
)
def test_pre_tokenizers(pre: str, expected: list[str]) -> None:
    assert tokens(from_metadata(byte_level_metadata(pre)), "a  12", add_special_tokens=False) == expected


def test_bos_and_eos_as_the_metadata_say() -> None:
    def ends(**changes: bool) -> list[str | None]:
        return tokens(from_metadata(byte_level_metadata("llama-bpe", **changes)), "a")

    assert ends() == ["<bos>", "a"]  # Llama 3's files say nothing and mean yes
    assert ends(**{"ggml.add_bos_token": False}) == ["a"]
    assert ends(**{"ggml.add_eos_token": True}) == ["<bos>", "a", "<|end|>"]
    assert tokens(from_metadata(byte_level_metadata("smollm")), "a") == ["a"]


def test_sentencepiece_merges_by_score() -> None:
    tokenizer = from_metadata(sentencepiece_metadata())
    assert tokens(tokenizer, "abc") == ["<s>", "▁a", "bc"]  # bc scores best, then ▁a
    assert tokens(tokenizer, "  a", add_special_tokens=False) == ["▁▁", "▁a"]
    assert tokens(tokenizer, "é", add_special_tokens=False) == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("abc é\n🙂  a")) == "abc é\n🙂  a"
    bare = from_metadata(sentencepiece_metadata(**{"ggml.add_space_prefix": False}))
    assert tokens(bare, "abc", add_special_tokens=False) == ["abc"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level_metadata("grok-9"), r"tokenizer\.ggml\.pre: 'grok-9' is not supported"),
        (
            byte_level_metadata(**{"ggml.model": "rwkv"}),
            r"tokenizer\.ggml\.model: 'rwkv' is not supported \(gpt2, llama are\)",
        ),
        (
            {**byte_level_metadata(), "tokenizer.ggml.merges": ["no such"]},
            r"inconsistent vocabulary .*fetch the file again",
        ),
        ({"tokenizer.ggml.model": "gpt2"}, r"GGUF metadata has no 'tokenizer\.ggml\.tokens'"),
    ],
)
def test_metadata_that_make_no_tokenizer(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        from_metadata(metadata)


def test_directory(tmp_path: Path) -> None:
    special = {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "<|end|>", "pad_token": None}
    write_tokenizer(write_directory(tmp_path), **special, chat_template="{{ messages[0].content }}{{ eos_token }}")
    tokenizer = load_tokenizer(resolve(str(tmp_path)))
    assert tokenizer is not None
    assert tokenizer.encode("hello") == TINY.encode("hello")
    assert tokenizer.bos_token_id == TINY.bos_token_id
    assert tokenizer.eos_token_id == TINY.eos_token_id
    assert tokenizer.pad_token_id is None
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi<|end|>"


def test_template_file_comes_before_the_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="config")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_directory(tmp_path).apply_chat_template([]) == "file"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write_tokenizer(tmp_path, chat_template=named)
    assert Tokenizer.from_directory(tmp_path).apply_chat_template([], tools=[{}]) == "tools"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("file")
    assert Tokenizer.from_directory(tmp_path).apply_chat_template([], tools=[{}]) == "file"
    assert Tokenizer.from_directory(tmp_path).apply_chat_template([]) == "plain"
    write_tokenizer(tmp_path, chat_template=[7])
    with pytest.raises(ModelError, match=r"chat_template: expected text or a list of named ones, got \[7\]"):
        Tokenizer.from_directory(tmp_path)


def test_padding_and_cutting_of_the_file_are_off(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    backend = Tokenizer.from_directory(tmp_path).backend
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("a b c d") == TINY.encode("a b c d")
    assert [len(ids) for ids in tokenizer.encode_batch(["a", "a b c d"])] == [1, 7]


def test_bos_that_the_config_asks_for(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, add_bos_token=True, bos_token="<bos>", eos_token="<|end|>")
    assert tokens(Tokenizer.from_directory(tmp_path), "a") == ["<bos>", "a"]
    assert tokens(Tokenizer.from_directory(tmp_path), "a", add_special_tokens=False) == ["a"]
    write_tokenizer(tmp_path, add_bos_token=True, bos_token="<unheard>")
    with pytest.raises(ModelError, match="add_bos_token is set, but bos_token is '<unheard>', which is no token"):
        Tokenizer.from_directory(tmp_path)


def test_model_without_a_tokenizer(tmp_path: Path) -> None:
    source = resolve(str(write_directory(tmp_path)))
    assert load_tokenizer(source) is None
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer.from_source(source)


@pytest.mark.parametrize(
    ("file", "content"), [("tokenizer.json", "{"), ("tokenizer_config.json", "{"), ("tokenizer_config.json", "[]")]
)
def test_damaged_files(tmp_path: Path, file: str, content: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=file):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "🙂\ud83d"])
def test_lone_surrogates_are_refused(text: str) -> None:
    for encode in (lambda: TINY.encode(text), lambda: TINY.encode_batch(["fine", text])):
        with pytest.raises(
            InvalidRequest, match=r"prompt: not valid Unicode: character \d is the lone surrogate"
        ) as caught:
            encode()
        assert caught.value.field == "prompt"
    with pytest.raises(InvalidRequest, match=r"input\[1\]: not valid Unicode") as caught:
        TINY.encode_batch(["fine", text], fields=["input[0]", "input[1]"])
    assert caught.value.field == "input[1]"


@pytest.fixture
def bert() -> Tokenizer:
    """A letter is a token, [CLS] and [SEP] stand around a text."""
    words = ["[CLS]", "[SEP]", *byte_alphabet()]
    backend = tokenizers.Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[SEP]"))
    backend.pre_tokenizer = Split("", "isolated")
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)])
    return Tokenizer(backend, {})


@pytest.mark.parametrize("special", [True, False])
def test_cut_as_the_library_cuts(bert: Tokenizer, special: bool) -> None:
    texts = ["", "abc", "abcd", "abcdefghij"]
    library = tokenizers.Tokenizer.from_str(bert.backend.to_str())
    for most in (3, 5, 6, 100):
        library.enable_truncation(most)
        expected = [library.encode(text, add_special_tokens=special).ids for text in texts]
        assert bert.encode_batch(texts, special, most) == expected
    assert bert.encode_batch(["", ""], True, 2) == [[0, 1], [0, 1]]
    with pytest.raises(InvalidRequest, match="truncate_prompt_tokens: 2 leaves no room beside the 2 special tokens"):
        bert.encode_batch(["", "a"], True, 2)


def test_other_threads_go_on_while_a_long_text_is_cut(bert: Tokenizer) -> None:
    """An event loop among them; a tokenizer that holds the GIL would stop it for seconds."""
    text, ended, pauses = "a" * 400_000, threading.Event(), [0.0]

    def tick() -> None:
        last = time.monotonic()
        while not ended.wait(1e-3):
            pauses[-1] = max(pauses[-1], time.monotonic() - last)
            last = time.monotonic()

    thread = threading.Thread(target=tick)
    thread.start()
    shares = []
    for _ in range(3):
        began = time.monotonic()
        assert len(bert.encode_batch([text], True, 100)[0]) == 100
        bert.encode_batch([text], False)  # for comparison: all of it
        shares.append(pauses[-1] / (time.monotonic() - began))
        pauses.append(0.0)
    ended.set()
    thread.join()
    assert min(shares) < 0.3


@pytest.mark.parametrize("token_ids", [[-1], [2**40]])
def test_ids_that_cannot_be_tokens(token_ids: list[int]) -> None:
    with pytest.raises(InvalidRequest, match=r"tokens: expected token ids from 0 to \d+"):
        TINY.decode(token_ids)


def test_no_chat_template() -> None:
    metadata = {key: value for key, value in byte_level_metadata().items() if key != "tokenizer.chat_template"}
    with pytest.raises(InvalidRequest, match="messages: this model has no chat template") as caught:
        from_metadata(metadata).apply_chat_template([{"role": "user", "content": "Hi"}])
    assert caught.value.field == "messages"


def test_token_bytes() -> None:
    assert TINY.token_bytes is not None
    assert [TINY.token_bytes(i) for i in range(256)] == [bytes([b]) for b in range(256)]
    assert [TINY.token_bytes(i) for i in TINY.encode(" hello<|end|>")] == [b" hello", b"<|end|>"]
    assert TINY.token_bytes(10**6) == b""
    assert from_metadata(sentencepiece_metadata()).token_bytes is None
    assert len(set(byte_alphabet())) == 256


def test_many_threads_at_once() -> None:
    texts = [f"hello {i} <think>" * 20 for i in range(50)]
    expected = TINY.encode_batch(texts)
    failures: list[str] = []

    def worker() -> None:
        failures.extend(
            t for t, ids in zip(texts, expected, strict=True) if TINY.encode(t) != ids or TINY.decode(ids) != t
        )

    threads = [threading.Thread(target=worker) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
