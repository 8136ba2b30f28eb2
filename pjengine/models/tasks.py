"""What a model is for: it generates, embeds or classifies, as its files or the user say."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import tokenizers

from pjengine.errors import ModelError
from pjengine.models.heads import Dense, Head
from pjengine.models.sentence_files import Pooling
from pjengine.models.sources import Source


def head_of(source: Source, module: ModuleType, config: Any, task: str = "auto") -> Head | None:
    """The head that a model gets for a task; None: it generates.

    Args:
      source: the model's files.
      module, config: as `model_of` gives them.
      task: "generate", "embed", "classify" or "auto": sentence-transformers' pooling means embed, an architecture
        "…ForSequenceClassification" or a LogitScore module classify; otherwise a decoder generates, an encoder embeds.
    Raises: ModelError where the model cannot do it.
    """
    match _task_of(source, module) if task == "auto" else task:
        case "generate":
            if not hasattr(module, "logits"):
                raise ModelError(
                    f"{source.path}: task: a {source.model_type} model cannot generate; use embed or classify"
                )
            return None
        case "embed":
            return _embedding_head(source, module, config)
        case "classify":
            return _class_head(source, module)
        case other:
            raise ModelError(f"task: expected auto, generate, embed or classify, got {other!r}")


def _task_of(source: Source, module: ModuleType) -> str:
    if source.pooling is not None:
        return "embed"
    if source.sentence.score_tokens or _is_classifier(source):
        return "classify"
    return "generate" if hasattr(module, "logits") else "embed"


def _is_classifier(source: Source) -> bool:
    return any(str(name).endswith("ForSequenceClassification") for name in source.config.get("architectures") or ())


def _embedding_head(source: Source, module: ModuleType, config: Any) -> Head:
    """Without sentence-transformers files a decoder's last token, an encoder's first one, scaled to length 1."""
    pooling = source.pooling or Pooling("last" if hasattr(module, "logits") else "cls", True, None)
    size = config.hidden_size
    for dense in pooling.dense:
        if dense.inputs != size:
            raise ModelError(f"{source.path / dense.folder}: in_features: expected {size}, got {dense.inputs}")
        size = dense.outputs
    layers = tuple(Dense(f"{d.folder}.linear", d.inputs, d.outputs, d.activation, d.bias) for d in pooling.dense)
    return Head("embed", pooling.mode, layers, normalize=pooling.normalize)


def _class_head(source: Source, module: ModuleType) -> Head:
    if _is_classifier(source):
        if not hasattr(module, "classifier"):
            raise ModelError(f"{source.path}: task: {source.model_type} models are not supported as classifiers")
        head = module.classifier(source.config)
    elif hasattr(module, "logits"):
        tokens = source.sentence.score_tokens or _yes_and_no(source)
        head = Head("classify", "last", token_ids=tokens, labels=("relevance",), activation="sigmoid")
    else:
        raise ModelError(
            f"{source.path}: task: config.json's architectures are {source.config.get('architectures')}, none of them "
            "a …ForSequenceClassification; this model embeds"
        )
    return dataclasses.replace(head, activation=source.sentence.activation or head.activation)


def _vocabulary(source: Source) -> tokenizers.Tokenizer:
    if source.gguf is not None:
        from pjengine.models.gguf_tokenizer import tokenizer_of

        return tokenizer_of(source.gguf)
    file = source.path / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{source.path}: task: to classify by yes and no a tokenizer.json is needed")
    return tokenizers.Tokenizer.from_file(str(file))


def _yes_and_no(source: Source) -> tuple[int, ...]:
    """Of Qwen3-Reranker (arXiv:2506.05176): the score is the log-odds of "yes" against "no"."""
    vocabulary = _vocabulary(source)
    yes, no = (vocabulary.token_to_id(word) for word in ("yes", "no"))
    if yes is None or no is None:
        raise ModelError(f"{source.path}: task: to classify, its tokenizer must have the tokens 'yes' and 'no'")
    return yes, no
