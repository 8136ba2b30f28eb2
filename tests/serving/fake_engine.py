"""A scripted engine with the real one's face: it answers with the prompt's own tokens, one a step, over and over.

What a prompt contains steers it: see `SCRIPT`. Runs where the server runs the real engine, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import struct
import time
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pjengine.config import EngineConfig
from pjengine.engine_info import EngineInfo
from pjengine.errors import EngineOverloaded, InvalidRequest, ModelError, OutOfMemory
from pjengine.metrics import Stats
from pjengine.models.sentence_files import SentenceFiles
from pjengine.models.sources import Source
from pjengine.request import Output, Request, Timings, TokenLogprobs
from pjengine.serving.text_side import TextSide
from pjengine.tokenizer import Tokenizer

SCRIPT = {
    "<crash>": "the step raises",
    "<die>": "the process is killed, as by the kernel's out-of-memory killer",
    "<fail>": "this request ends with an error",
    "<eos>": "the sequence ends after the prompt was repeated once",
}
PAGE_SIZE = 16
WINDOW = 512
EMBEDDING_SIZE = 4
SPECIAL_TOKENS = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
BOS, EOS = 256, 257
PROMPTS = SentenceFiles(prompts={"query": "find: "})
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('an unknown role') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """A byte is a token, its value the id."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these stand for themselves in GPT-2's alphabet
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    templates = [{"name": "default", "template": TEMPLATE}]
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": templates})


def load_text(config: EngineConfig) -> TextSide:
    source = Source("fake", "dummy", Path("fake"), {"model_type": "bert"}, {"temperature": 0.5}, PROMPTS)
    return TextSide(source, make_tokenizer())


@dataclasses.dataclass
class FakeSequence:
    request: Request
    index: int
    text: str
    arrived: float
    generated: int = 0

    @property
    def pages(self) -> int:
        return -(-(len(self.request.prompt_token_ids) + self.generated) // PAGE_SIZE)


class FakeEngine:
    """See the module.

    Args:
      kind: "generate", "embed" or "classify".
      labels: of "classify": a label's logit is how often its first letter comes in the text; of one label, how often
        "!" does, less 1.
      step_seconds: how long a step takes.
      max_running: sequences in a step; the others wait.
    """

    def __init__(self, config: EngineConfig, kind: str, step_seconds: float, max_running: int, labels: tuple[str, ...]):
        self.info = EngineInfo(
            model=config.model,
            kind=kind,
            vocab_size=VOCAB_SIZE,
            max_model_len=WINDOW,
            eos_token_ids=(EOS,),
            embedding_size=EMBEDDING_SIZE if kind == "embed" else 0,
            labels=labels,
            activation="" if kind != "classify" else "sigmoid" if len(labels) == 1 else "softmax",
            max_num_seqs=max_running if kind == "generate" else 0,
            token_types=2 if kind == "classify" else 0,
        )
        self._max_waiting = config.max_waiting
        self._step_seconds = step_seconds
        self._max_running = max_running
        self._tokenizer = make_tokenizer()
        self._sequences: list[FakeSequence] = []
        self._prompt_tokens = self._generation_tokens = self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def add(self, request: Request) -> None:
        n = request.params.n if request.params else 1
        if any(token >= VOCAB_SIZE for token in request.prompt_token_ids):
            raise InvalidRequest("prompt: token id is outside the vocabulary", field="prompt")
        if len(self._sequences) + n > self._max_running + self._max_waiting:
            raise EngineOverloaded("too many sequences are waiting; retry later", retry_after=2.5)
        text = self._tokenizer.decode(request.prompt_token_ids)
        self._sequences += [FakeSequence(request, index, text, time.monotonic()) for index in range(n)]
        self._prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self._sequences = [
            s for s in self._sequences if s.request.request_id != request_id or (index is not None and s.index != index)
        ]

    def step(self) -> list[Output]:
        time.sleep(self._step_seconds)
        self._steps += 1
        outputs = [self._advance(sequence) for sequence in self._sequences[: self._max_running]]
        done = {(o.request_id, o.index) for o in outputs if o.finish_reason is not None}
        self._sequences = [s for s in self._sequences if (s.request.request_id, s.index) not in done]
        return outputs

    def stats(self) -> Stats:
        running = self._sequences[: self._max_running]
        used = sum(s.pages for s in running)
        return Stats(
            running=len(running),
            waiting=len(self._sequences) - len(running),
            kv_usage=used / 1000,
            used_pages=used,
            total_pages=1000,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            steps=self._steps,
        )

    def _advance(self, sequence: FakeSequence) -> Output:
        request, prompt = sequence.request, sequence.request.prompt_token_ids
        output = Output(request_id=request.request_id, index=sequence.index)
        if "<crash>" in sequence.text:
            raise RuntimeError("the script says so")
        if "<die>" in sequence.text:
            os.kill(os.getpid(), signal.SIGKILL)
        if "<fail>" in sequence.text:
            output.finish_reason, output.error = "error", "this request cannot be computed"
            return output
        if self.info.kind == "classify":
            logits = [sequence.text.count(label[0]) for label in self.info.labels]
            if len(logits) == 1:
                logits = [sequence.text.count("!") - 1]
            output.logits, output.finish_reason = struct.pack(f"<{len(logits)}f", *logits), "stop"
            return output
        if request.params is None:
            output.embedding = struct.pack(f"<{EMBEDDING_SIZE}f", len(prompt), prompt[0], prompt[-1], 0.1)
            output.finish_reason = "stop"
            output.timings = Timings(queued=0.0, first_token=0.0, finished=time.monotonic() - sequence.arrived)
            return output
        params = request.params
        ends = "<eos>" in sequence.text and not params.ignore_eos and sequence.generated >= len(prompt)
        token = EOS if ends else prompt[(sequence.generated + sequence.index) % len(prompt)]
        if sequence.generated == 0:
            output.cached_tokens = 1
            if params.prompt_logprobs is not None and sequence.index == 0:
                rest = [logprobs_of(t, params.prompt_logprobs) for t in prompt[1:]]
                output.prompt_logprobs = [None, *rest]
        sequence.generated += 1
        self._generation_tokens += 1
        output.token_ids = [token]
        if params.logprobs is not None:
            output.logprobs = [logprobs_of(token, params.logprobs)]
        if token in params.stop_token_ids:
            output.finish_reason, output.stop_reason = "stop", token
        elif ends:
            output.finish_reason = "stop"
        elif sequence.generated == params.max_tokens or len(prompt) + sequence.generated == WINDOW:
            output.finish_reason = "length"
        if sequence.generated == 1 or output.finish_reason is not None:
            taken = time.monotonic() - sequence.arrived
            output.timings = Timings(queued=0.0, first_token=taken, finished=taken)
        return output


def logprobs_of(token: int, k: int) -> TokenLogprobs:
    """The token is always the second most likely."""
    top = [((token + 1) % 256, -0.5), (token, -1.0), ((token + 2) % 256, -2.0)]
    return TokenLogprobs(-1.0, 2, top[:k])


def make_fake_engine(
    config: EngineConfig,
    kind: str = "generate",
    step_seconds: float = 0.001,
    max_running: int = 32,
    labels: tuple[str, ...] = (),
) -> FakeEngine:
    return FakeEngine(config, kind, step_seconds, max_running, tuple(labels))


def fail_to_start(config: EngineConfig, how: str) -> FakeEngine:
    """An engine that does not start."""
    if how == "model":
        raise ModelError("model: no weights in /nowhere")
    if how == "memory":
        raise OutOfMemory("weights take 80 GiB, the device has 24 GiB")
    if how == "bug":
        raise KeyError("forgotten")
    if how == "hang":
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
