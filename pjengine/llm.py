"""`LLM`: a model in this process, for scripts. Text in and text out; the engine below it sees token ids only."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from pjengine.collector import Collector
from pjengine.config import EngineConfig
from pjengine.errors import ConfigError, EngineDead, EngineOverloaded, InvalidRequest, PJEngineError
from pjengine.factory import make_engine
from pjengine.interrupts import deferred_interrupts
from pjengine.matryoshka import check_dimensions, shorten
from pjengine.models.sources import resolve
from pjengine.outputs import EmbeddingOutput, RequestOutput
from pjengine.prompts import (
    Message,
    Prompt,
    as_conversations,
    as_params,
    as_prompts,
    default_params,
    engine_params,
    fit_window,
    with_prompt,
)
from pjengine.request import Output, Request
from pjengine.request_checks import check_prompt
from pjengine.sampling_params import SamplingParams
from pjengine.tokenizer import Tokenizer, load_tokenizer


class LLM:
    """A model ready to generate or embed, in this process.

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
        source = resolve(config.model, config.load_format)
        self.tokenizer: Tokenizer | None = load_tokenizer(source)
        self._default_sampling = source.default_sampling
        self._sentence = source.sentence
        self._engine = make_engine(config)
        self._ids = itertools.count()
        self._closed = False

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
    ) -> list[EmbeddingOutput]:
        """Embeds each prompt, pooled and normalised as the model's own configuration says.

        Args:
          prompts: one text or a list of them, each a string or token ids (special ones included).
          use_tqdm: show a progress bar.
          prompt_name: which of the model's own prompts to put before each text; "": none; None: the model's default.
          dimensions: keep so many elements of each embedding, scaled to length 1, for models trained for it
            (Matryoshka); None: all, as the model makes them.
        Returns:
          one result per prompt, in the order of the prompts.
        Raises:
          InvalidRequest: a prompt is wrong. Nothing was embedded then.
        """
        self._require("embed", "embed")
        check_dimensions(dimensions, self._engine.info)
        texts = with_prompt(as_prompts(prompts), self._sentence, prompt_name)
        token_ids = self._encode(texts, add_special_tokens=True)
        embeddings: dict[int, np.ndarray] = {}
        with _Progress(len(token_ids), "Embedding", use_tqdm) as progress:

            def receive(i: int, output: Output) -> bool:
                if output.embedding is None:
                    raise PJEngineError(f"prompts[{i}]: {output.error or 'the engine gave no embedding'}")
                (embeddings[i],) = shorten(np.frombuffer(output.embedding, "<f4").astype(np.float32)[None], dimensions)
                progress.advance(len(token_ids[i]), 0)
                return False

            self._run([(ids, None) for ids in token_ids], receive)
        return [EmbeddingOutput(embeddings[i], ids) for i, ids in enumerate(token_ids)]

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
        with _Progress(len(collectors), "Generating", use_tqdm) as progress:

            def receive(i: int, output: Output) -> bool:
                collector = collectors[i]
                stopped = collector.add(output)
                if (stopped or output.finish_reason is not None) and collector.finished:
                    progress.advance(len(token_ids[i]), collector.generated_tokens)
                return stopped

            self._run(list(zip(token_ids, params, strict=True)), receive)
        return [collector.result() for collector in collectors]

    def _run(
        self, work: Sequence[tuple[list[int], SamplingParams | None]], receive: Callable[[int, Output], bool]
    ) -> None:
        """Runs requests of (prompt, parameters), as many at a time as the engine takes, until all have finished.

        However it ends, by an error or Ctrl-C too, none of them is left in the engine.

        Args:
          work: the requests.
          receive: gets (index of the request, what it gained) and says whether that sequence must be aborted now.
        """
        engine = self._engine
        index: dict[str, int] = {}
        try:
            with deferred_interrupts() as check_interrupt:
                while len(index) < len(work) or engine.has_work:
                    self._feed(work, index)
                    for output in engine.step():
                        i = index.get(output.request_id)
                        if i is not None and receive(i, output):
                            engine.abort(output.request_id, output.index)
                    check_interrupt()
        finally:
            for request_id in index:
                engine.abort(request_id)

    def _feed(self, work: Sequence[tuple[list[int], SamplingParams | None]], index: dict[str, int]) -> None:
        """Adds requests until the engine's queue is full; enters them in `index`."""
        while len(index) < len(work):
            token_ids, params = work[len(index)]
            request = Request(request_id=str(next(self._ids)), prompt_token_ids=token_ids, params=params)
            try:
                self._engine.add(request)
            except EngineOverloaded:
                if not self._engine.has_work:
                    raise  # it will never fit
                return
            index[request.request_id] = len(index)

    def _encode(self, prompts: Sequence[Prompt], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each prompt, checked."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if texts and self.tokenizer is None:
            raise InvalidRequest("prompts: this model has no tokenizer; give token ids", field="prompts")
        tokenized = iter(self.tokenizer.encode_batch(texts, add_special_tokens) if self.tokenizer else ())
        encoded = [next(tokenized) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        for i, ids in enumerate(encoded):
            check_prompt(ids, self._engine.info, field=f"prompts[{i}]")
        return encoded

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, token_ids: list[list[int]]
    ) -> list[SamplingParams]:
        """SamplingParams of each prompt, as the engine takes them."""
        info, count = self._engine.info, len(token_ids)
        if given is None:
            given = default_params(self._default_sampling)
        if isinstance(given, SamplingParams):
            each = [engine_params(given, info, self.tokenizer)] * count
        else:
            each = [engine_params(p, info, self.tokenizer) for p in as_params(given, count)]
        return [fit_window(p, len(ids), info) for p, ids in zip(each, token_ids, strict=True)]

    def _require(self, kind: str, method: str) -> None:
        if self._closed:
            raise EngineDead("this LLM is closed; make a new one")
        info = self._engine.info
        if info.kind != kind:
            other = {"embed": "embed", "classify": "classify or score", "generate": "generate or chat"}[info.kind]
            raise ConfigError(f"model: {info.model} cannot {method}; use {other}, or another model")


class _Progress:
    """A bar over requests, with token rates; `advance` counts one request."""

    def __init__(self, total: int, what: str, shown: bool):
        self._bar = tqdm(total=total, desc=what, unit="req", dynamic_ncols=True, disable=not shown)
        self._start = time.monotonic()
        self._tokens_in = 0
        self._tokens_out = 0

    def advance(self, tokens_in: int, tokens_out: int) -> None:
        self._tokens_in += tokens_in
        self._tokens_out += tokens_out
        seconds = max(time.monotonic() - self._start, 1e-9)
        rates = f"in {self._tokens_in / seconds:.0f} tok/s, out {self._tokens_out / seconds:.0f} tok/s"
        self._bar.set_postfix_str(rates, refresh=False)
        self._bar.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
