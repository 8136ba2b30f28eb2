"""From a model's name to its parameters on the device: `load(name) -> (module, params, config)`."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import re
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.errors import ConfigError, ModelError
from pjengine.models import registry
from pjengine.models.heads import Head
from pjengine.models.heads import param_specs as head_specs
from pjengine.models.hf_config import check_sizes
from pjengine.models.params import ParamSpec, init_params, is_spec
from pjengine.models.readers import Joined, TensorReader
from pjengine.models.safetensors_files import stored_dtype
from pjengine.models.sources import Source, resolve
from pjengine.models.tasks import head_of

DTYPES = ("float32", "bfloat16", "float16")
READ_THREADS = 8
_READ_AHEAD = READ_THREADS  # parameters in host memory at once
# Tensors of which no parameter is made: computed tables, and heads that embeddings do not use.
_HARMLESS = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|position_ids|attn\.bias|attn\.masked_bias)"
    r"|(\w+\.)?pooler\.dense\.\w+|cls\..*|lm_head\.(bias|(dense|layer_norm|decoder)\.\w+)"
    r"|vocab_(transform|layer_norm|projector)\.\w+|head\.(dense|norm)\.\w+|decoder\.(weight|bias)"
    r"|(pre_)?classifier\.(\w+\.)?(weight|bias)|score\.weight"
)
_ENCODER_PREFIXES = ("bert.", "roberta.", "distilbert.", "nomic_bert.", "gte.", "new.", "mpnet.")
_HEAD = "lm_head.weight"


def load(name: str, *, dtype: str = "auto", load_format: str = "auto", seed: int = 0) -> tuple[ModuleType, Any, Any]:
    """A model ready for its pure functions: `module.forward(params, inputs, cache, config)`.

    Args:
      name: directory, .gguf file, embedded name or hub id, as `sources.resolve` takes it.
      dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own on an accelerator, float32 on a CPU.
      load_format: as `sources.resolve` takes it; "dummy" draws random weights on the device.
      seed: of random weights.
    Returns: (model module, parameters as in its `weight_specs`, its config).
    Raises:
      ModelError: the model cannot be found, understood or read.
      ConfigError: an unknown dtype.
    """
    source = resolve(name, load_format)
    module, config = model_of(source)
    head = head_of(source, module, config)
    params = load_source(source, module, config, choose_dtype(source, dtype), head=head, seed=seed)
    return module, params, config


def model_of(source: Source) -> tuple[ModuleType, Any]:
    """The model module and config of a source; ModelError names a field that cannot be honoured."""
    try:
        check_sizes(source.config)
        module = registry.get(source.model_type)
        return module, module.Config.from_hf(source.config)
    except (TypeError, ValueError) as error:  # ModelError among them
        raise ModelError(f"{source.path}: config: {error}") from error


def choose_dtype(source: Source, dtype: str, platform: str | None = None) -> jnp.dtype:
    """The dtype of weights and computation.

    Args:
      dtype: one of DTYPES, or "auto": float32 on a CPU, the checkpoint's own elsewhere.
      platform: of the device; None: the default device's.
    """
    if dtype in DTYPES:
        return jnp.dtype(dtype)
    if dtype != "auto":
        raise ConfigError(f"dtype: expected one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    if (platform or jax.default_backend()) == "cpu":
        return jnp.dtype("float32")
    return checkpoint_dtype(source)


def checkpoint_dtype(source: Source) -> jnp.dtype:
    """What config.json says its weights are in; where it says nothing, what they are; bfloat16 without weights."""
    found = source.config.get("dtype") or source.config.get("torch_dtype")
    if found is None:
        found = stored_dtype(source.path) if source.kind == "safetensors" else "bfloat16"
    if found not in DTYPES:
        raise ModelError(
            f"{source.path}: config: dtype: expected one of {', '.join(DTYPES)}, got {found!r}; set --dtype"
        )
    return jnp.dtype(found)


def load_source(
    source: Source,
    module: ModuleType,
    config: Any,
    dtype: Any,
    *,
    head: Head | None = None,
    seed: int = 0,
    shardings: Any = None,
) -> Any:
    """A source's weights on the device, read in parallel; host memory holds a few tensors at a time, never the model.

    Args:
      dtype: of every parameter whose spec does not fix its own.
      head: as `tasks.head_of` gives it; its weights come along, and a language model's lm_head only where it is used.
      seed: of random weights (a "dummy" source).
      shardings: tree of jax.sharding.Sharding like `param_specs`; None: all on the default device.
    Returns: the tree of `weight_specs` with arrays for specs.
    Raises:
      ModelError: a tensor is missing, of another shape, unknown, or cannot be read.
    """
    specs = weight_specs(module, config, head)
    if source.kind == "dummy":
        params = init_params(specs, dtype, seed)
        return params if shardings is None else jax.device_put(params, shardings)
    if source.kind == "orbax":
        from pjengine.models.orbax_files import restore

        return restore(source, specs, dtype, shardings)
    leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
    places = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    reader = open_tensors(source)
    own = {name for spec in jax.tree.leaves(specs.get("head", ()), is_leaf=is_spec) for name in spec.sources}
    plan = _plan(reader, leaves, own, headless="lm_head" not in specs)
    arrays = [
        _assemble(parts, spec.transpose, jnp.dtype(spec.dtype or dtype), place)
        for spec, place, parts in zip(leaves, places, _read_ahead(reader, plan), strict=True)
    ]
    return jax.tree.unflatten(treedef, arrays)


def weight_specs(module: ModuleType, config: Any, head: Head | None) -> dict[str, Any]:
    """`module.param_specs` and, under "head", those of a head; without the lm_head where the head does not use it."""
    specs = module.param_specs(config)
    if head is None:
        return specs
    if not head.token_ids:
        specs.pop("lm_head", None)
    return {**specs, "head": head_specs(head)} if head.layers else specs


def open_tensors(source: Source) -> TensorReader:
    """The checkpoint's tensors under their Hugging Face names."""
    if source.kind == "gguf":
        from pjengine.models.gguf_files import GGUFTensors

        return GGUFTensors(source.path)
    from pjengine.models.safetensors_files import SafetensorsFiles

    folders = [dense.folder for dense in source.pooling.dense] if source.pooling else []
    parts = {folder: SafetensorsFiles(source.path / folder) for folder in folders}
    return Joined({"": SafetensorsFiles(source.path), **parts}) if parts else SafetensorsFiles(source.path)


def _plan(reader: TensorReader, specs: list[ParamSpec], own: set[str], headless: bool) -> list[list[str]]:
    """The stored tensors of each parameter; ModelError where checkpoint and parameters do not match one to one.

    Args:
      own: names of a head's tensors, which have one spelling.
      headless: an lm_head is not used.
    """
    names = [name for spec in specs for name in spec.sources]
    stored = _stored_names(reader.shapes, [name for name in names if name not in own]) | {name: name for name in own}
    missing = [name for name in stored if stored[name] not in reader.shapes]
    if missing:
        raise ModelError(
            f"{reader.where}: missing tensors: {_some(missing)}; incomplete, or config.json is another model's"
        )
    unknown = sorted(
        name
        for name in reader.shapes.keys() - stored.values()
        if not (_HARMLESS.fullmatch(name) or (headless and name == _HEAD))
    )
    if unknown:
        raise ModelError(f"{reader.where}: unknown tensors: {_some(unknown)}; config.json may be another model's")
    plan = [[stored[name] for name in spec.sources] for spec in specs]
    for spec, names in zip(specs, plan, strict=True):
        _check_shape(reader, spec, names)
    return plan


def _stored_names(shapes: Mapping[str, Any], names: list[str]) -> dict[str, str]:
    """Declared name -> stored name: a base model saved without its head lacks the prefix, one saved with it has it."""
    for spelling in (
        {name: name for name in names},
        {name: name.removeprefix("model.") for name in names},
        *({name: f"{prefix}{name}" for name in names} for prefix in _ENCODER_PREFIXES),
    ):
        if shapes.keys() >= set(spelling.values()):
            return spelling
    return {name: name for name in names}


def _check_shape(reader: TensorReader, spec: ParamSpec, names: list[str]) -> None:
    expected = spec.shape[::-1] if spec.transpose else spec.shape
    shapes = [reader.shapes[name] for name in names]
    rows = sum(shape[0] if shape else 0 for shape in shapes)
    if any(shape[1:] != expected[1:] for shape in shapes) or rows != expected[0]:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))
        whole = "" if len(names) == 1 else " together"
        raise ModelError(
            f"{reader.where}: config.json asks for {list(expected)}{whole}, found {found}; it may be another model's"
        )


def _read_ahead(reader: TensorReader, plan: list[list[str]]) -> Iterator[list[np.ndarray]]:
    """Each parameter's tensors in order, read by threads a few parameters ahead."""
    with concurrent.futures.ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read-weights") as pool:
        waiting: collections.deque[concurrent.futures.Future[list[np.ndarray]]] = collections.deque()
        for names in plan:
            waiting.append(pool.submit(_read_all, reader, names))
            if len(waiting) >= _READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read_all(reader: TensorReader, names: list[str]) -> list[np.ndarray]:
    return [reader.read(name) for name in names]


def _assemble(parts: list[np.ndarray], transpose: bool, dtype: jnp.dtype, place: Any) -> jax.Array:
    array = _join([jax.device_put(part) for part in parts], transpose, dtype)
    return array if place is None else jax.device_put(array, place)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _join(parts: list[jax.Array], transpose: bool, dtype: jnp.dtype) -> jax.Array:
    whole = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
    return (whole.T if transpose else whole).astype(dtype)


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
