"""POST /v1/score and /v1/rerank: pairs of texts, by a cross-encoder or by the similarity of their embeddings."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
import uuid

import numpy as np
from starlette.responses import Response

from pjengine.errors import InvalidRequest
from pjengine.pairs import PairTokens
from pjengine.prompts import fit_tokens, with_prompt
from pjengine.scoring import check_scorer, cosine_scores, group_pairs, logit_scores, ranking
from pjengine.serving.context import ServerContext, prompt_fields
from pjengine.serving.pooled import run_pooled, usage_of
from pjengine.serving.protocol.base import Usage
from pjengine.serving.protocol.scoring import (
    PairRequest,
    RankedText,
    RerankRequest,
    RerankResponse,
    RerankResult,
    Score,
    ScoreRequest,
    ScoreResponse,
)
from pjengine.serving.responses import json_response


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """What is to be scored. groups: as `group_pairs` gives them; fields: what the user calls each text, for errors."""

    groups: list[tuple[str, list[str]]]
    query_fields: list[str]
    document_fields: list[str]


async def create_score(context: ServerContext, body: ScoreRequest) -> Response:
    names = body.fields
    queries, documents = (getattr(body, name) for name in names)
    groups = group_pairs(queries, documents, fields=names)
    starts = itertools.accumulate((len(texts) for _, texts in groups[:-1]), initial=0)
    query_fields = [names[0]] if isinstance(queries, str) else [f"{names[0]}[{i}]" for i in starts]
    pairs = _Pairs(groups, query_fields, prompt_fields(names[1], documents))
    scores, usage = await _score(context, body, pairs)
    return json_response(
        ScoreResponse(
            id=f"score-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=context.model_names[0],
            data=[Score(index=i, score=score) for i, score in enumerate(scores.tolist())],
            usage=usage,
        )
    )


async def create_rerank(context: ServerContext, body: RerankRequest) -> Response:
    texts = [document if isinstance(document, str) else document.text for document in body.documents]
    pairs = _Pairs([(body.query, texts)], ["query"], prompt_fields("documents", texts))
    scores, usage = await _score(context, body, pairs)
    results = [
        RerankResult(
            index=i,
            relevance_score=float(scores[i]),
            document=RankedText(text=texts[i]) if body.return_documents else None,
        )
        for i in ranking(scores, body.top_n)
    ]
    return json_response(
        RerankResponse(id=f"rerank-{uuid.uuid4().hex}", model=context.model_names[0], results=results, usage=usage)
    )


async def _score(context: ServerContext, body: PairRequest, pairs: _Pairs) -> tuple[np.ndarray, Usage]:
    """Float32 scores of the pairs, in order."""
    context.require_model(body.model, "classify", "embed", task="score pairs of texts")
    check_scorer(context.info)
    if context.info.kind == "embed":
        return await _by_similarity(context, body, pairs)
    arrival = time.monotonic()
    encoder = context.require_pairs(pairs.document_fields[0])
    most = fit_tokens(body.truncate_prompt_tokens, context.info)

    def encode() -> list[PairTokens]:
        return [
            pair
            for (query, documents), field in zip(pairs.groups, pairs.query_fields, strict=True)
            for pair in encoder.encode(query, documents, instruction=body.instruction, max_tokens=most, field=field)
        ]

    encoded = await asyncio.to_thread(encode)
    token_ids = [pair.token_ids for pair in encoded]
    logits = await run_pooled(
        context,
        token_ids,
        fields=pairs.document_fields,
        priority=body.priority,
        arrival=arrival,
        token_type_ids=[pair.token_type_ids for pair in encoded],
    )
    return logit_scores(logits, context.info, body.use_activation), usage_of(token_ids)


async def _by_similarity(context: ServerContext, body: PairRequest, pairs: _Pairs) -> tuple[np.ndarray, Usage]:
    """The cosine similarity of embeddings, of texts with the model's default prompt if it has one."""
    arrival = time.monotonic()
    if body.instruction is not None:
        raise InvalidRequest(f"instruction: {context.info.model} reads none; leave it out", field="instruction")
    queries = [query for query, _ in pairs.groups]
    documents = [text for _, texts in pairs.groups for text in texts]
    texts = with_prompt(queries + documents, context.source.sentence, None)
    most = fit_tokens(body.truncate_prompt_tokens, context.info)
    prompts = await context.encode_prompts(texts, pairs.document_fields[0], True, most)
    encoded = [prompt.token_ids for prompt in prompts]
    vectors = await run_pooled(
        context, encoded, fields=pairs.query_fields + pairs.document_fields, priority=body.priority, arrival=arrival
    )
    counts = [len(texts) for _, texts in pairs.groups]
    owners = np.repeat(np.arange(len(counts)), counts)
    return cosine_scores(vectors[owners], vectors[len(counts) :]), usage_of(encoded)
