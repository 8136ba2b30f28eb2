"""Engine options: one frozen struct, shared by `LLM(...)`, the CLI and the server. Unknown names raise."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from typing import Any

from pjengine.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "orbax", "dummy")
TASKS = ("auto", "generate", "embed", "classify")
BACKENDS = ("auto", "reference", "mosaic", "triton")
PAGE_SIZES = (16, 32, 64, 128)
_MOST = 2**30  # of anything counted: positions are int32
_KINDS: dict[str, tuple[type, ...]] = {  # of the annotations below; NumPy's numbers are numbers
    "str": (str,),
    "int": (numbers.Integral,),
    "float": (numbers.Real,),
    "bool": (bool,),
    "None": (type(None),),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of an engine. Each is also a CLI flag (`max_model_len` is `--max-model-len`), as in vLLM where it has it.

    Attributes:
      model: directory, .gguf file, hub id or embedded name (`pjengine models` lists those).
      task: what to do with the model: "generate", "embed" or "classify" (score pairs of texts too); "auto": as its
        files say, a decoder without sentence-transformers files generates.
      dtype: of weights and KV cache; "auto": the checkpoint's own on a GPU, float32 on a CPU.
      load_format: "auto" looks at the files; "dummy" draws random weights of the config's shapes on the device.
      seed: of dummy weights and of requests that bring no seed of their own; at least 0.
      max_model_len: longest sequence, prompt and output together, in tokens; None: the model's own limit.
      max_num_seqs: most sequences in a step; None: 512 on a GPU, 64 on a CPU (embedding models: budget / 8).
      max_num_batched_tokens: token budget of a step; None: 4096 on a GPU, 512 on a CPU (embedding models: measured when
        the engine starts, where the device is saturated).
      max_wait_ms: embedding models: how long a text may wait on a free device for others to join its batch.
      max_waiting: most requests that may wait; one more is refused with EngineOverloaded.
      page_size: tokens per KV page; None: the device's default.
      num_pages: KV pages of the full-attention group; None: as many as memory allows.
      gpu_memory_utilization: share of the device's memory the engine may use; None: all but the 1.75 GiB that CUDA
        takes for itself.
      cpu_kv_bytes: memory for KV pages where there is no GPU, bytes.
      enable_prefix_caching: reuse the pages of equal prompt prefixes.
      attention_backend: one of BACKENDS; "auto" takes the first that can serve the op.
      eager_buckets: start when the executables of that many step sizes are ready, the two that can run any step first,
        and compile the others meanwhile; None: when all are.
      compile_cache: directory of compiled executables; None: the XDG cache directory; "": none.
    """

    model: str
    task: str = "auto"
    dtype: str = "auto"
    load_format: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_wait_ms: float = 0.0
    max_waiting: int = 16384
    page_size: int | None = None
    num_pages: int | None = None
    gpu_memory_utilization: float | None = None
    cpu_kv_bytes: int = 1 << 30
    enable_prefix_caching: bool = True
    attention_backend: str = "auto"
    eager_buckets: int | None = None
    compile_cache: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.model, os.PathLike):
            object.__setattr__(self, "model", os.fspath(self.model))
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), str(field.type).split(" | ")
            ok = any(isinstance(value, _KINDS[kind]) for kind in kinds)
            ok = ok and ("bool" in kinds or not isinstance(value, bool))  # to Python a bool is a number
            _require(ok, field.name, value, " or ".join(kinds))
        for name, allowed in (
            ("task", TASKS),
            ("dtype", DTYPES),
            ("load_format", LOAD_FORMATS),
            ("attention_backend", BACKENDS),
            ("page_size", (None, *PAGE_SIZES)),
        ):
            value = getattr(self, name)
            _require(value in allowed, name, value, f"one of {', '.join(map(str, allowed))}")
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_waiting", "eager_buckets"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
            _require(value is None or value <= _MOST, name, value, f"at most {_MOST}")
        _require(self.seed >= 0, "seed", self.seed, "at least 0")
        _require(self.num_pages is None or self.num_pages >= 2, "num_pages", self.num_pages, "at least 2")
        share = self.gpu_memory_utilization
        _require(share is None or 0 < share <= 1, "gpu_memory_utilization", share, "in (0, 1]")
        _require(0 <= self.max_wait_ms < math.inf, "max_wait_ms", self.max_wait_ms, "milliseconds, at least 0")
        _require(self.cpu_kv_bytes > 0, "cpu_kv_bytes", self.cpu_kv_bytes, "above 0")

    @classmethod
    def make(cls, model: str, **options: Any) -> EngineConfig:
        """As the constructor, but an unknown option is a ConfigError that lists the known ones."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                raise ConfigError(f"{name}: unknown engine option; known are {', '.join(sorted(known - {'model'}))}")
        return cls(model=model, **options)


def _require(ok: bool, field: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{field}: expected {allowed}, got {value!r}")
