"""Orbax model directories: `convert` writes one, `restore` reads its weights sharded and in parallel.

Beside config.json, generation_config.json and the tokenizer's files, as in any Hugging Face directory, lies an Orbax
checkpoint of the parameters in the tree of the model's `param_specs`: fused, transposed, ready for use.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from pjengine.errors import ModelError
from pjengine.models.params import is_spec
from pjengine.models.sources import ORBAX_WEIGHTS, Source

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "*_Pooling/config.json",
    "*_Dense/config.json",
    "*_LogitScore/config.json",
)


def write(source: Source, params: Any, destination: Path) -> None:
    """Writes a model directory; nothing is there until all of it is.

    Args:
      source: whose config and tokenizer go along.
      params: arrays in the tree of the model's `param_specs`.
      destination: a directory that does not exist or is empty.
    Raises:
      ModelError: it holds something, or cannot be written.
    """
    check_destination(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as temporary:
            folder = Path(temporary) / "model"
            folder.mkdir()
            _write_json(folder / "config.json", source.config)
            if source.generation_config:
                _write_json(folder / "generation_config.json", source.generation_config)
            _write_tokenizer(source, folder)
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(folder / ORBAX_WEIGHTS, params)
            folder.rename(destination)  # POSIX: replaces an empty directory
    except OSError as error:
        raise ModelError(f"dst: {destination} cannot be written: {error.strerror or error}") from error


def check_destination(destination: Path) -> None:
    """ModelError unless the directory does not exist yet, or is empty."""
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ModelError(f"dst: {destination} exists and is not empty; give another directory, or remove it first")


def restore(source: Source, specs: Any, dtype: Any, shardings: Any = None) -> Any:
    """A converted model's parameters, each device reading its own shards, cast to `dtype` on the way.

    Args:
      specs: the model's `param_specs`.
      dtype: of every parameter whose spec does not fix its own.
      shardings: tree of jax.sharding.Sharding like `specs`; None: all on the default device.
    Raises:
      ModelError: the checkpoint is damaged, or not of these shapes.
    """
    path = (source.path / ORBAX_WEIGHTS).absolute()
    if shardings is None:
        here = jnp.zeros(()).sharding
        shardings = jax.tree.map(lambda _: here, specs, is_leaf=is_spec)
    wanted = jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype or dtype), sharding=sharding),
        specs,
        shardings,
        is_leaf=is_spec,
    )
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path).item_metadata
            if stored is None:
                raise ValueError("its metadata cannot be read")
            _check_shapes(path, specs, stored.tree)
            return checkpointer.restore(path, wanted)
        except ModelError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds
            reason = str(error).partition("\n")[0][:300]
            raise ModelError(f"{path}: damaged Orbax checkpoint ({reason}); convert the model again") from error


def _check_shapes(path: Path, specs: Any, stored: Any) -> None:
    expected = {name: tuple(spec.shape) for name, spec in _named(specs)}
    found = {name: tuple(array.shape) for name, array in _named(stored)}
    wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"{path}: {name}: the model has shape {expected.get(name)}, the checkpoint {found.get(name)} "
            f"({len(wrong)} differ); convert the model again with this version of pjengine"
        )


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    """Leaves by path, such as `layers.0.qkv`; stored trees have the lists' indices as keys."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape")):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _write_tokenizer(source: Source, folder: Path) -> None:
    if source.gguf is not None:
        from pjengine.models.gguf_tokenizer import tokenizer_config_of, tokenizer_of

        tokenizer_of(source.gguf).save(str(folder / "tokenizer.json"))
        _write_json(folder / "tokenizer_config.json", tokenizer_config_of(source.gguf))
        return
    for pattern in _COPIED:
        for file in source.path.glob(pattern):
            copy = folder / file.relative_to(source.path)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n", "utf-8")
