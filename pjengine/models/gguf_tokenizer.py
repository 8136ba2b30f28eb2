"""Builds a `tokenizers.Tokenizer` from GGUF metadata: vocabulary, merges or scores, and the pre-tokenizer's name.

What each name stands for is fixed by llama.cpp (src/llama-vocab.cpp, `llm_tokenizer_bpe`), whose regular expressions
come from the models' own tokenizer.json. A name not known here is refused: a wrong split gives wrong tokens, silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pjengine.errors import ModelError
from pjengine.models.gguf_format import GGUFHeader

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[str, tuple[str, ...]] = {  # each expression splits the pieces of the one before
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", _GPT2)
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "dbrx", "smaug-bpe"), (_LLAMA3,)
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken")
_NFC = ("qwen2",)


def tokenizer_of(header: GGUFHeader) -> Tokenizer:
    """The model's tokenizer; ModelError where its kind is unknown or its metadata are inconsistent."""
    kind = header.require("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise _unsupported(header, "tokenizer.ggml.model", kind, builders)
    tokens: list[str] = header.require("tokenizer.ggml.tokens")
    try:
        tokenizer = builders[kind](header, {token: i for i, token in enumerate(tokens)})
        _add_special_tokens(header, tokenizer, tokens)
    except ModelError:
        raise
    except Exception as error:  # the library raises bare Exception, for merges of unknown tokens among others
        raise ModelError(
            f"{header.path}: tokenizer.ggml: inconsistent vocabulary ({error}); fetch the file again"
        ) from error
    _add_bos_and_eos(header, tokenizer, tokens)
    return tokenizer


def tokenizer_config_of(header: GGUFHeader) -> dict[str, Any]:
    """tokenizer_config.json: special tokens as text, and the chat template."""
    tokens = header.require("tokenizer.ggml.tokens")
    config: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None and token < len(tokens):
            config[f"{name}_token"] = tokens[token]
    prefix = "tokenizer.chat_template"
    named = {k[len(prefix) + 1 :]: v for k, v in header.metadata.items() if k.startswith(prefix + ".")}
    if prefix in header.metadata:
        named["default"] = header.metadata[prefix]
    if named:
        config["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
    return config


def _byte_level(header: GGUFHeader, vocab: dict[str, int]) -> Tokenizer:
    pre = header.require("tokenizer.ggml.pre")
    if pre not in _SPLITS:
        raise _unsupported(header, "tokenizer.ggml.pre", pre, _SPLITS)
    merges = [_pair(merge) for merge in header.require("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in _SPLITS[pre]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(header: GGUFHeader, vocab: dict[str, int]) -> Tokenizer:
    """SentencePiece's BPE: pieces merge by score, unknown characters fall back to bytes."""
    tokens, scores = header.require("tokenizer.ggml.tokens"), header.require("tokenizer.ggml.scores")
    unknown = header.metadata.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            _merges_by_score(tokens, scores, vocab),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    text: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if header.metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces = [normalizers.Prepend("▁"), *spaces]
        text = [*text, decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(text)
    return tokenizer


def _merges_by_score(tokens: Sequence[str], scores: Sequence[float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best-scored piece first."""
    merges = [
        (score, len(token[:i]), len(token[i:]), token[:i], token[i:])
        for token, score in zip(tokens, scores, strict=True)
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3:] for merge in merges]


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _add_special_tokens(header: GGUFHeader, tokenizer: Tokenizer, tokens: list[str]) -> None:
    kinds = header.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    by_kind = {
        kind: [
            AddedToken(t, special=kind == _CONTROL, normalized=False)
            for t, k in zip(tokens, kinds, strict=True)
            if k == kind
        ]
        for kind in (_CONTROL, _USER_DEFINED)
    }
    tokenizer.add_special_tokens(by_kind[_CONTROL])
    tokenizer.add_tokens(by_kind[_USER_DEFINED])


def _add_bos_and_eos(header: GGUFHeader, tokenizer: Tokenizer, tokens: list[str]) -> None:
    sentencepiece = header.require("tokenizer.ggml.model") == "llama"
    bos_default = sentencepiece or header.metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS_FIRST

    def added(name: str, default: bool) -> str | None:
        token = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        wanted = header.metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        return tokens[token] if wanted and token is not None else None

    set_template(tokenizer, added("bos", bos_default), added("eos", False))


def set_template(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Makes `encode(add_special_tokens=True)` put `bos` before a text and `eos` behind it, where given."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token],
    )


def _unsupported(header: GGUFHeader, key: str, value: object, known: Any) -> ModelError:
    return ModelError(
        f"{header.path}: {key}: {value!r} is not supported ({', '.join(known)} are); use its Hugging Face directory"
    )
