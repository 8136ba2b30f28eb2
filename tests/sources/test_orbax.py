"""Orbax directories: what `convert` writes loads as its source does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pjengine.errors import ModelError
from pjengine.models import load
from pjengine.models.conversion import convert
from pjengine.models.loading import choose_dtype, load_source, model_of
from pjengine.models.params import is_spec
from pjengine.models.sources import Pooling, resolve
from pjengine.tokenizer import load_tokenizer
from tests.helpers import GOLDEN
from tests.sources.checkpoints import CONFIG, write_directory, write_gguf
from tests.text.vocabularies import byte_level_metadata, write_tokenizer


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GGUF model with a tokenizer, and what it was converted to."""
    folder = tmp_path_factory.mktemp("orbax")
    src = write_gguf(folder / "model.gguf", config={**CONFIG, "vocab_size": 300}, metadata=byte_level_metadata())
    return src, convert(str(src), folder / "converted")


def assert_equal_trees(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_loads_as_its_source(converted: tuple[Path, Path]) -> None:
    src, dst = converted
    module, params, config = load(str(dst))
    assert resolve(str(dst)).kind == "orbax"
    assert (module, config) == (load(str(src))[0], load(str(src))[2])
    assert_equal_trees(params, load(str(src))[1])


def test_keeps_tokenizer_template_and_ends(converted: tuple[Path, Path]) -> None:
    src, dst = (resolve(str(path)) for path in converted)
    before, after = load_tokenizer(src), load_tokenizer(dst)
    assert before is not None
    assert after is not None
    text = "<|start|>Hello, wörld 12 "
    assert after.encode(text) == before.encode(text)
    messages = [{"role": "user", "content": "Hi"}]
    assert after.apply_chat_template(messages) == before.apply_chat_template(messages)
    assert (dst.eos_token_ids, after.eos_token_id) == (src.eos_token_ids, before.eos_token_id)


def test_casts_while_restoring(converted: tuple[Path, Path]) -> None:
    src, dst = converted
    params = load(str(dst), dtype="bfloat16")[1]
    assert {array.dtype.name for array in jax.tree.leaves(params)} == {"bfloat16"}
    assert_equal_trees(params, load(str(src), dtype="bfloat16")[1])
    assert choose_dtype(resolve(str(dst)), "auto", platform="gpu") == "bfloat16"


def test_restores_with_shardings(converted: tuple[Path, Path]) -> None:
    source = resolve(str(converted[1]))
    module, config = model_of(source)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    shardings = jax.tree.map(lambda _: placed, module.param_specs(config), is_leaf=is_spec)
    params = load_source(source, module, config, "float32", shardings=shardings)
    assert {array.sharding for array in jax.tree.leaves(params)} == {placed}


SHARDED = """
import sys
import jax, numpy as np
from pjengine.models.loading import load_source, model_of
from pjengine.models.params import is_spec
from pjengine.models.sources import Pooling, resolve

mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
halves = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
for path in sys.argv[1:]:
    source = resolve(path)
    module, config = model_of(source)
    shardings = jax.tree.map(lambda _: halves, module.param_specs(config), is_leaf=is_spec)
    sharded = load_source(source, module, config, "float32", shardings=shardings)
    assert all(array.addressable_shards[0].data.shape[0] * 2 == array.shape[0] for array in jax.tree.leaves(sharded))
    jax.tree.map(np.testing.assert_array_equal, sharded, load_source(source, module, config, "float32"))
"""


def test_each_device_gets_its_shards(converted: tuple[Path, Path]) -> None:
    """On two CPU devices, which a process must ask for before it starts JAX."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", SHARDED, *map(str, converted)], check=True, env=environment)


def test_dtype_that_was_asked_for_is_kept(tmp_path: Path) -> None:
    write_directory(tmp_path / "src")
    lines: list[str] = []
    source = resolve(str(convert(str(tmp_path / "src"), tmp_path / "dst", dtype="bfloat16", progress=lines.append)))
    assert choose_dtype(source, "auto", platform="gpu") == "bfloat16"
    assert [line.split()[0] for line in lines] == ["reading", "writing"]


def test_keeps_what_a_sentence_transformer_needs(tmp_path: Path) -> None:
    src = write_directory(tmp_path / "src")
    modules = [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}]
    (src / "modules.json").write_text(json.dumps(modules))
    (src / "1_Pooling").mkdir()
    (src / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    write_tokenizer(src, chat_template="x")
    converted = resolve(str(convert(str(src), tmp_path / "dst")))
    assert converted.pooling == resolve(str(src)).pooling == Pooling("cls", normalize=False, max_seq_length=None)
    tokenizer = load_tokenizer(converted)
    assert tokenizer is not None
    assert tokenizer.apply_chat_template([]) == "x"


@pytest.mark.parametrize("name", ["sentence-transformer", "cross-encoder"])
def test_keeps_the_weights_of_a_head(tmp_path: Path, name: str) -> None:
    """Dense modules and classifiers: what is read back is what was converted."""
    src = str(GOLDEN / name)
    dst = str(convert(src, tmp_path / "dst"))
    assert resolve(dst).sentence == resolve(src).sentence
    model, params, _ = load(src)
    again, converted, _ = load(dst)
    assert again is model
    assert len(converted["head"]) == 2
    jax.tree.map(np.testing.assert_array_equal, converted, params)


def test_refuses_a_destination_in_use(tmp_path: Path) -> None:
    write_directory(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"dst: .* exists and is not empty"):
        convert(str(tmp_path / "src"), tmp_path / "dst")
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["notes.txt"]


def test_empty_destination_is_free(tmp_path: Path) -> None:
    write_directory(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    assert_equal_trees(load(str(convert(str(tmp_path / "src"), tmp_path / "dst")))[1], load(str(tmp_path / "src"))[1])


def test_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    write_directory(tmp_path / "src", {})
    with pytest.raises(ModelError, match="missing tensors"):
        convert(str(tmp_path / "src"), tmp_path / "dst")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_config_of_another_model(tmp_path: Path) -> None:
    dst = convert(str(write_directory(tmp_path / "src")), tmp_path / "dst")
    config = json.loads((dst / "config.json").read_text())
    (dst / "config.json").write_text(json.dumps({**config, "vocab_size": 81}))
    with pytest.raises(ModelError, match=r"embed: the model has shape \(81, 64\), the checkpoint \(80, 64\)"):
        load(str(dst))
    (dst / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"layers\.2\.\w+: the model has shape .*the checkpoint None"):
        load(str(dst))


def test_damaged_checkpoint(tmp_path: Path) -> None:
    dst = convert(str(write_directory(tmp_path / "src")), tmp_path / "dst")
    (dst / "orbax" / "_METADATA").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"damaged Orbax checkpoint .*convert the model again"):
        load(str(dst))
