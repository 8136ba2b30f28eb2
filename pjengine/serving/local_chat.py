"""`pjengine chat`: a conversation with an engine in this process, each answer streamed to standard output."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec

from pjengine.config import EngineConfig
from pjengine.detokenizer import Detokenizer
from pjengine.errors import ModelError, PJEngineError
from pjengine.factory import make_engine
from pjengine.interrupts import deferred_interrupts
from pjengine.models.sources import resolve
from pjengine.prompts import default_params, engine_params, fit_window
from pjengine.request import Request
from pjengine.request_checks import check_prompt
from pjengine.sampling_params import SamplingParams
from pjengine.serving.engine_process import EngineLike
from pjengine.tokenizer import Tokenizer, load_tokenizer


def run_chat(config: EngineConfig, *, system: str | None, **sampling: Any) -> None:
    """Answers each line of standard input; `sampling`: SamplingParams' fields, None for the model's default."""
    source = resolve(config.model, config.load_format)
    tokenizer = load_tokenizer(source)
    if tokenizer is None or tokenizer.chat_template is None:
        raise ModelError(f"model: {config.model} has no chat template; use `pjengine generate`")
    params = default_params(source.default_sampling, **sampling)
    if sampling.get("max_tokens") is None:
        params = msgspec.structs.replace(params, max_tokens=None)  # up to the window
    conversation = Conversation(make_engine(config, progress=sys.stderr.isatty()), tokenizer, params, system)
    for message in _messages():
        if message == "/clear":
            conversation.clear()
            continue
        try:
            for text in conversation.answer(message):
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            pass  # the answer ends here; the conversation goes on
        except PJEngineError as error:
            print(f"pjengine: error: {error}", file=sys.stderr, end="")
        print(flush=True)


class Conversation:
    """A conversation and its engine. All of it is the prompt of each answer; the prefix cache makes that cheap."""

    def __init__(self, engine: EngineLike, tokenizer: Tokenizer, params: SamplingParams, system: str | None):
        self._engine = engine
        self._tokenizer = tokenizer
        self._params = engine_params(params, engine.info, tokenizer)
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._start)

    def clear(self) -> None:
        self._messages = list(self._start)

    def answer(self, message: str) -> Iterator[str]:
        """Yields the answer piece by piece; what was yielded when it is interrupted stays in the conversation.

        Raises:
          InvalidRequest: the conversation does not fit the model's window; the message is taken back.
        """
        messages = [*self._messages, {"role": "user", "content": message}]
        prompt = self._tokenizer.encode(self._tokenizer.apply_chat_template(messages), add_special_tokens=False)
        check_prompt(prompt, self._engine.info, field="messages")
        said = ""
        try:
            for text in self._generate(prompt):
                said += text
                yield text
        finally:
            self._messages = [*messages, {"role": "assistant", "content": said}]

    def _generate(self, prompt: list[int]) -> Iterator[str]:
        params = fit_window(self._params, len(prompt), self._engine.info)
        request = Request(request_id=uuid.uuid4().hex, prompt_token_ids=prompt, params=params)
        detokenizer = Detokenizer.make(self._tokenizer, prompt, params)
        self._engine.add(request)
        with deferred_interrupts() as check_interrupt:
            try:
                while self._engine.has_work:
                    for output in self._engine.step():
                        if output.finish_reason == "error":
                            raise PJEngineError(output.error or "the engine gave no reason")
                        spelled = output.token_ids if output.finish_reason != "stop" else output.token_ids[:-1]
                        text, stopped = detokenizer.push(spelled, finished=output.finish_reason is not None)
                        yield text
                        if stopped is not None:
                            return
                    check_interrupt()
            finally:
                self._engine.abort(request.request_id)
                while self._engine.has_work:
                    self._engine.step()  # what is on its way to the device


def _messages() -> Iterator[str]:
    """Lines that are not blank, with a prompt where somebody types them."""
    typed = sys.stdin.isatty()
    while True:
        if typed:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
