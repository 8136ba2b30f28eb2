"""Scores of pairs of texts: who is paired with whom, and what numbers become."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from pjengine.activations import activate
from pjengine.engine_info import EngineInfo
from pjengine.errors import InvalidRequest
from pjengine.request_checks import check_unicode, is_integer


def group_pairs(
    queries: str | Sequence[str], documents: str | Sequence[str], *, fields: tuple[str, str] = ("queries", "documents")
) -> list[tuple[str, list[str]]]:
    """Pairs in order, those that follow one another with the same query together: (query, its documents).

    One query is paired with every document; as many queries as documents are paired one to one (as in vLLM).

    Args:
      fields: what the user calls the two, for errors.
    Raises:
      InvalidRequest: there are no pairs, the numbers do not match, or a text is no string or no valid Unicode.
    """
    first, second = (_as_texts(texts, field) for texts, field in zip((queries, documents), fields, strict=True))
    for texts, field in zip((first, second), fields, strict=True):
        if not texts:
            raise InvalidRequest(f"{field}: is empty; give at least one text", field=field)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InvalidRequest(f"{field}[{i}]: expected a string, got {text!r}", field=f"{field}[{i}]")
            check_unicode(text, f"{field}[{i}]")
    if len(first) == 1:
        return [(first[0], second)]
    if len(first) != len(second):
        raise InvalidRequest(
            f"{fields[0]}: {len(first)} of them for {len(second)} {fields[1]}; give one, or as many", field=fields[0]
        )
    pairs = zip(first, second, strict=True)
    return [(query, [text for _, text in same]) for query, same in itertools.groupby(pairs, lambda pair: pair[0])]


def _as_texts(given: object, field: str) -> list[Any]:
    if isinstance(given, str):
        return [given]
    if not isinstance(given, (Sequence, np.ndarray)) or isinstance(given, bytes):
        raise InvalidRequest(f"{field}: expected a string or a list of them, got {given!r}", field=field)
    return list(given)


def cosine_scores(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Cosine similarity of each query and its document: float32 [n] of embeddings [n, embedding_size]."""
    norms = np.linalg.norm(queries, axis=-1) * np.linalg.norm(documents, axis=-1)
    return (queries * documents).sum(-1) / np.maximum(norms, 1e-12)


def logit_scores(logits: np.ndarray, info: EngineInfo, use_activation: bool) -> np.ndarray:
    """Float32 [n] of a reranker's logits [n, 1].

    Args:
      use_activation: apply the model's own, most often a sigmoid; else the logits are the scores.
    """
    return (activate(logits, info.activation) if use_activation else logits)[:, 0]


def check_scorer(info: EngineInfo) -> None:
    """Raises InvalidRequest for a classifier of more than one class, which has no score for a pair."""
    if info.kind == "classify" and len(info.labels) != 1:
        raise InvalidRequest(
            f"model: {info.model} sorts texts into {len(info.labels)} classes and scores no pairs; classify with it",
            field="model",
            code="wrong_model_kind",
        )


def check_top_n(top_n: int | None) -> None:
    """Raises InvalidRequest unless it is None or an integer of at least 0."""
    if top_n is not None and not (is_integer(top_n) and top_n >= 0):
        raise InvalidRequest(f"top_n: expected an integer of at least 0, got {top_n!r}", field="top_n")


def ranking(scores: np.ndarray, top_n: int | None) -> list[int]:
    """Indices of the `top_n` highest scores, the highest first; equal ones keep their order. None or 0: of all."""
    order: list[int] = np.argsort(-scores, kind="stable").tolist()
    return order[: top_n or None]
