"""`LLM`: a model in this process, for scripts. Text in and text out; the engine below it sees token ids only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from pjengine.activations import activate
from pjengine.collector import Collector
from pjengine.config import EngineConfig
from pjengine.engine_info import EngineInfo
from pjengine.errors import ConfigError, EngineDead, InvalidRequest
from pjengine.factory import make_engine
from pjengine.matryoshka import check_dimensions, shorten
from pjengine.models.sources import resolve
from pjengine.offline_run import Progress, run_pooled, run_requests
from pjengine.outputs import ClassificationOutput, EmbeddingOutput, RankedDocument, RequestOutput
from pjengine.pairs import PairEncoder
from pjengine.prompts import (
    Message,
    Prompt,
    as_conversations,
    as_params,
    as_prompts,
    default_params,
    engine_params,
    fit_tokens,
    fit_window,
    with_prompt,
)
from pjengine.request import Output, Request
from pjengine.request_checks import check_prompt, check_unicode
from pjengine.sampling_params import SamplingParams
from pjengine.scoring import check_scorer, check_top_n, cosine_scores, group_pairs, logit_scores, ranking
from pjengine.tokenizer import Tokenizer, load_tokenizer


class LLM:
    """A model ready to generate, embed, score or classify, in this process.

    Not thread-safe: one call at a time. Use as a context manager, or `close()` it, to free the device's memory.

    Args:
      model: directory, .gguf file, hub id or embedded name.
      **options: fields of EngineConfig.
    Raises:
      ConfigError: an unknown option, or a value that cannot work.
      ModelError: the model cannot be found or read.
      OutOfMemory: it does not fit.
    """

    def __init__(self, model: str, **options: Any):
        config = EngineConfig.make(model, **options)
        self._source = source = resolve(config.model, config.load_format)
        self.tokenizer: Tokenizer | None = load_tokenizer(source)
        self._engine = make_engine(config)
        self._ids = itertools.count()
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        """Of the engine: the model's kind, window, embedding size, …"""
        self._require_open()
        return self._engine.info

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues each prompt.

        Args:
          prompts: one prompt or a list of them, each a string or token ids.
          sampling_params: for all prompts, or one each; None: the model's own defaults. Generation ends at the model's
            window, with finish reason "length", where max_tokens would lead past it.
          use_tqdm: show a progress bar.
        Returns:
          one result per prompt, in the order of the prompts.
        Raises:
          InvalidRequest: a prompt or its parameters are wrong. Nothing was generated then.
        """
        self._require("generate", "generate")
        texts = as_prompts(prompts)
        token_ids = self._encode(texts, add_special_tokens=True)
        return self._generate(texts, token_ids, self._params(sampling_params, token_ids), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answers each conversation, through the model's chat template.

        Args:
          messages: one conversation (a list of {"role": …, "content": …}) or a list of conversations.
          sampling_params, use_tqdm: as in `generate`.
          add_generation_prompt: end the prompt where the assistant's answer begins.
          **template_options: further variables of the model's template, such as `tools` or `enable_thinking`.
        Returns:
          one result per conversation, in order; `prompt` is the rendered template.
        Raises:
          InvalidRequest: as in `generate`, or the model has no chat template or cannot render the messages.
        """
        self._require("generate", "chat")
        if self.tokenizer is None:
            raise InvalidRequest(
                "messages: this model has no tokenizer, so no chat template; use generate with token ids"
            )
        conversations = as_conversations(messages)
        texts = [
            self.tokenizer.apply_chat_template(c, add_generation_prompt=add_generation_prompt, **template_options)
            for c in conversations
        ]
        # Templates write the special tokens themselves.
        token_ids = self._encode(texts, add_special_tokens=False)
        return self._generate(texts, token_ids, self._params(sampling_params, token_ids), use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        use_tqdm: bool = True,
        *,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingOutput]:
        """Embeds each prompt, pooled and normalised as the model's own configuration says.

        Args:
          prompts: one text or a list of them, each a string or token ids (special ones included).
          use_tqdm: show a progress bar.
          prompt_name: which of the model's own prompts to put before each text; "": none; None: the model's default.
          dimensions: keep so many elements of each embedding, scaled to length 1, for models trained for it
            (Matryoshka); None: all, as the model makes them.
          truncate_prompt_tokens: longer texts lose their end: -1, beyond the model's window; N, beyond N tokens. None:
            they are refused where the window has no room for them.
        Returns:
          one result per prompt, in the order of the prompts.
        Raises:
          InvalidRequest: a prompt is wrong. Nothing was embedded then.
        """
        self._require("embed", "embed")
        check_dimensions(dimensions, self._engine.info)
        token_ids = self.tokenize(
            as_prompts(prompts), prompt_name=prompt_name, truncate_prompt_tokens=truncate_prompt_tokens
        )
        self._check(token_ids)
        vectors = run_pooled(self._engine, self._requests(token_ids), "Embedding", "prompts", use_tqdm)
        vectors = shorten(vectors, dimensions)
        return [EmbeddingOutput(vector, ids) for vector, ids in zip(vectors, token_ids, strict=True)]

    def tokenize(
        self,
        prompts: Sequence[str | list[int]],
        *,
        prompt_name: str | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[list[int]]:
        """Token ids as `embed` makes them of its prompts; may be called while another thread embeds.

        Raises:
          InvalidRequest: there is no such prompt name. Whether the model has room for the tokens is not checked.
        """
        texts = with_prompt(prompts, self._source.sentence, prompt_name)
        return self._tokenize(texts, True, truncate_prompt_tokens)

    def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        use_tqdm: bool = True,
        *,
        instruction: str | None = None,
        truncate_prompt_tokens: int | None = None,
        use_activation: bool = True,
    ) -> np.ndarray:
        """Scores pairs of texts: with a cross-encoder or reranker, or by the cosine similarity of embeddings.

        Args:
          queries, documents: one query with every document, or as many as there are documents, one with one.
          use_tqdm: show a progress bar.
          instruction: what to judge by, for rerankers with a prompt (Qwen3-Reranker); None: the model's default.
          truncate_prompt_tokens: as in `embed`; of a pair it is the document that loses its end.
          use_activation: apply the model's own activation, most often a sigmoid; else the scores are logits.
        Returns:
          float32 [pairs], in order.
        Raises:
          InvalidRequest: a text is wrong, or the numbers do not match. Nothing was scored then.
        """
        self._require("classify", "score", also="embed")
        info = self._engine.info
        check_scorer(info)
        groups = group_pairs(queries, documents)
        if info.kind == "embed":
            if instruction is not None:
                raise InvalidRequest(f"instruction: {info.model} reads none; leave it out", field="instruction")
            texts = [query for query, _ in groups] + [text for _, paired in groups for text in paired]
            starts = itertools.accumulate((len(paired) for _, paired in groups[:-1]), initial=0)
            fields = [f"queries[{i}]" for i in starts] + [f"documents[{i}]" for i in range(len(texts) - len(groups))]
            prompts = with_prompt(texts, self._source.sentence, None)
            token_ids = self._encode(prompts, True, truncate_prompt_tokens, fields)
            vectors = run_pooled(self._engine, self._requests(token_ids), "Embedding", "texts", use_tqdm)
            owners = np.repeat(np.arange(len(groups)), [len(paired) for _, paired in groups])
            return cosine_scores(vectors[owners], vectors[len(groups) :])
        if self.tokenizer is None:
            raise InvalidRequest("queries: this model has no tokenizer, which pairs need", field="queries")
        encoder = PairEncoder(self._source, self.tokenizer, info)
        most = fit_tokens(truncate_prompt_tokens, info)
        firsts = itertools.accumulate((len(paired) for _, paired in groups[:-1]), initial=0)
        pairs = [
            pair
            for i, (query, paired) in zip(firsts, groups, strict=True)
            for pair in encoder.encode(
                query,
                paired,
                instruction=instruction,
                max_tokens=most,
                field="query" if isinstance(queries, str) else f"queries[{i}]",
            )
        ]
        for i, pair in enumerate(pairs):
            check_prompt(pair.token_ids, info, field=f"documents[{i}]")
        requests = self._requests([p.token_ids for p in pairs], None, [p.token_type_ids for p in pairs])
        return logit_scores(run_pooled(self._engine, requests, "Scoring", "documents", use_tqdm), info, use_activation)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None = None,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[RankedDocument]:
        """Ranks documents by their relevance to a query.

        Args:
          top_n: only the best so many; None or 0: all.
          use_tqdm: show a progress bar.
          **options: those of `score`.
        Returns:
          the documents, the most relevant first; equal scores keep their order.
        Raises:
          InvalidRequest: as in `score`.
        """
        check_top_n(top_n)
        if not isinstance(query, str):
            raise InvalidRequest(f"query: expected a string, got {query!r}", field="query")
        check_unicode(query, "query")
        documents = [documents] if isinstance(documents, str) else documents
        scores = self.score(query, documents, use_tqdm, **options)
        return [RankedDocument(i, float(scores[i]), documents[i]) for i in ranking(scores, top_n)]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        use_tqdm: bool = True,
        *,
        truncate_prompt_tokens: int | None = None,
        use_activation: bool = True,
    ) -> list[ClassificationOutput]:
        """Sorts each prompt into one of the model's classes.

        Args:
          prompts: one text or a list of them, each a string or token ids (special ones included).
          use_tqdm: show a progress bar.
          truncate_prompt_tokens: as in `embed`.
          use_activation: apply the model's own activation (softmax, or sigmoid for one class); else `probs` are logits.
        Returns:
          one result per prompt, in the order of the prompts.
        Raises:
          InvalidRequest: a prompt is wrong. Nothing was classified then.
        """
        self._require("classify", "classify")
        info = self._engine.info
        token_ids = self._encode(as_prompts(prompts), True, truncate_prompt_tokens)
        logits = run_pooled(self._engine, self._requests(token_ids), "Classifying", "prompts", use_tqdm)
        scores = activate(logits, info.activation) if use_activation else logits
        best = logits.argmax(-1).tolist()
        return [ClassificationOutput(info.labels[b], s, ids) for b, s, ids in zip(best, scores, token_ids, strict=True)]

    def close(self) -> None:
        """Frees the model, its cache and the device's memory; the object is of no use afterwards."""
        self._closed = True
        self.__dict__.pop("_engine", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _generate(
        self, texts: Sequence[Prompt], token_ids: list[list[int]], params: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        collectors = [
            Collector(text if isinstance(text, str) else None, ids, p, self.tokenizer)
            for text, ids, p in zip(texts, token_ids, params, strict=True)
        ]
        with Progress(len(collectors), "Generating", use_tqdm) as progress:

            def receive(i: int, output: Output) -> bool:
                collector = collectors[i]
                stopped = collector.add(output)
                if (stopped or output.finish_reason is not None) and collector.finished:
                    progress.advance(len(token_ids[i]), collector.generated_tokens)
                return stopped

            run_requests(self._engine, self._requests(token_ids, params), receive)
        return [collector.result() for collector in collectors]

    def _requests(
        self,
        token_ids: Sequence[list[int]],
        params: Sequence[SamplingParams] | None = None,
        token_type_ids: Sequence[list[int] | None] | None = None,
    ) -> list[Request]:
        nothing = [None] * len(token_ids)
        each = zip(token_ids, params or nothing, token_type_ids or nothing, strict=True)
        return [
            Request(request_id=str(next(self._ids)), prompt_token_ids=ids, params=p, token_type_ids=types)
            for ids, p, types in each
        ]

    def _encode(
        self,
        prompts: Sequence[Prompt],
        add_special_tokens: bool,
        truncate_prompt_tokens: int | None = None,
        fields: Sequence[str] | None = None,
    ) -> list[list[int]]:
        """Token ids of each prompt, cut and checked; `fields`: what the user calls each, `prompts[i]` if None."""
        encoded = self._tokenize(prompts, add_special_tokens, truncate_prompt_tokens, fields)
        self._check(encoded, fields)
        return encoded

    def _tokenize(
        self,
        prompts: Sequence[Prompt],
        add_special_tokens: bool,
        truncate_prompt_tokens: int | None,
        fields: Sequence[str] | None = None,
    ) -> list[list[int]]:
        fields = fields or [f"prompts[{i}]" for i in range(len(prompts))]
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        names = [field for field, prompt in zip(fields, prompts, strict=True) if isinstance(prompt, str)]
        if texts and self.tokenizer is None:
            raise InvalidRequest("prompts: this model has no tokenizer; give token ids", field="prompts")
        most = fit_tokens(truncate_prompt_tokens, self.info)
        tokenized = iter(self.tokenizer.encode_batch(texts, add_special_tokens, most, names) if self.tokenizer else ())
        return [next(tokenized) if isinstance(prompt, str) else list(prompt)[:most] for prompt in prompts]

    def _check(self, token_ids: Sequence[list[int]], fields: Sequence[str] | None = None) -> None:
        for i, ids in enumerate(token_ids):
            check_prompt(ids, self._engine.info, field=fields[i] if fields else f"prompts[{i}]")

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, token_ids: list[list[int]]
    ) -> list[SamplingParams]:
        """SamplingParams of each prompt, as the engine takes them."""
        info, count = self._engine.info, len(token_ids)
        if given is None:
            given = default_params(self._source.default_sampling)
        if isinstance(given, SamplingParams):
            each = [engine_params(given, info, self.tokenizer)] * count
        else:
            each = [engine_params(p, info, self.tokenizer) for p in as_params(given, count)]
        return [fit_window(p, len(ids), info) for p, ids in zip(each, token_ids, strict=True)]

    def _require_open(self) -> None:
        if self._closed:
            raise EngineDead("this LLM is closed; make a new one")

    def _require(self, kind: str, method: str, also: str | None = None) -> None:
        info = self.info
        if info.kind not in (kind, also):
            other = {
                "embed": "embed, score or rerank",
                "classify": "classify, score or rerank",
                "generate": "generate or chat",
            }[info.kind]
            task = f', load it with task "{kind}"' if info.kind == "generate" else ""
            raise ConfigError(f"model: {info.model} cannot {method}; use {other}{task}, or another model")
