"""One resolver from what a user calls a model to the files that make it: `resolve(name) -> Source`. Imports no jax."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pjengine.errors import ModelError
from pjengine.models.embedded import EMBEDDED_MODELS, fetch
from pjengine.models.gguf_format import GGUFHeader, read_header
from pjengine.models.json_files import read_json
from pjengine.models.sentence_files import Pooling, SentenceFiles, read_sentence_files

Kind = Literal["safetensors", "gguf", "orbax", "dummy"]

ORBAX_WEIGHTS = "orbax"  # the folder of a converted model that holds its Orbax checkpoint
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]
_HUB_LEFT_OUT = ["[!0-9]*/*.safetensors", "consolidated*"]  # the same weights in other layouts; 2_Dense is a module
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model's files, found and understood; weights are not read yet.

    Attributes:
      name: as the user gave it.
      kind: where weights come from; "dummy" draws them at random.
      path: the directory, or the .gguf file.
      config: its Hugging Face config.json (made from metadata for GGUF).
      generation_config: its generation_config.json; empty where there is none.
      sentence: what sentence-transformers files say.
      gguf: the header, where `path` is a .gguf file.
    """

    name: str
    kind: Kind
    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    sentence: SentenceFiles = dataclasses.field(default_factory=SentenceFiles)
    gguf: GGUFHeader | None = dataclasses.field(default=None, repr=False)

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def pooling(self) -> Pooling | None:
        """How a sentence-transformers embedder pools; None for other models."""
        return self.sentence.pooling

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence: generation_config.json's, else config.json's, else none."""
        found = self.generation_config.get("eos_token_id")
        if found is None:
            found = self.config.get("eos_token_id")
        return tuple(found) if isinstance(found, list) else () if found is None else (found,)

    @property
    def default_sampling(self) -> dict[str, Any]:
        """SamplingParams fields that the model's authors recommend in generation_config.json."""
        config = self.generation_config
        return {field: config[field] for field in _SAMPLING_FIELDS if config.get(field) is not None}


def resolve(name: str, load_format: str = "auto") -> Source:
    """Finds a model's files.

    Args:
      name: a directory (Hugging Face's, or what `pjengine convert` wrote), a .gguf file, an embedded name, or a hub id.
      load_format: "auto" looks at the files; "safetensors", "gguf" and "orbax" insist; "dummy" needs only a config.
    Raises:
      ModelError: nothing of that name, or files that cannot be understood.
    """
    name = os.fspath(name)
    path = _locate(name, dummy=load_format == "dummy")
    source = _gguf_source(name, path) if path.is_file() else _directory_source(name, path, dummy=load_format == "dummy")
    if load_format == "dummy":
        return dataclasses.replace(source, kind="dummy")
    if load_format not in ("auto", source.kind):
        raise ModelError(
            f"load_format: {load_format!r} was asked for, but {path} holds {source.kind}; use --load-format auto"
        )
    return source


def _locate(name: str, dummy: bool) -> Path:
    if name in EMBEDDED_MODELS:
        return fetch(name)
    path = Path(name).expanduser()
    if path.exists():
        if path.is_file() and path.suffix != ".gguf":
            raise ModelError(
                f"model: {name}: a single file must be a .gguf; for safetensors give the directory it lies in"
            )
        return path
    if _HUB_ID.fullmatch(name):
        return _hub_snapshot(name, dummy)
    raise ModelError(
        f"model: {name!r} is no directory, .gguf file, hub id (owner/name) or one of {', '.join(EMBEDDED_MODELS)}"
    )


def _gguf_source(name: str, path: Path) -> Source:
    from pjengine.models.gguf_files import config_of, generation_config_of

    header = read_header(path)
    return Source(name, "gguf", path, config_of(header), generation_config_of(header), gguf=header)


def _directory_source(name: str, path: Path, dummy: bool) -> Source:
    config = read_json(path / "config.json", dict)
    if config is None:
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; give the file itself: {path / ggufs[0]}" if ggufs else ": not a model directory"
        raise ModelError(f"model: {path} has no config.json{hint}")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(
            f"{path / 'config.json'}: model_type: expected a string such as 'llama', got {config.get('model_type')!r}"
        )
    generation_config = read_json(path / "generation_config.json", dict) or {}
    _check_token_ids(path, "config.json", config)
    _check_token_ids(path, "generation_config.json", generation_config)
    kind: Kind = "orbax" if (path / ORBAX_WEIGHTS).is_dir() else "safetensors"
    if kind == "safetensors" and not dummy:
        from pjengine.models.safetensors_files import weight_files

        if not weight_files(path):
            raise ModelError(
                f"model: {path} has no weights (*.safetensors, or {ORBAX_WEIGHTS}/ as `pjengine convert` writes); "
                "PyTorch .bin files must be converted to safetensors; --load-format dummy runs without weights"
            )
    return Source(name, kind, path, config, generation_config, sentence=read_sentence_files(path, config))


def _check_token_ids(path: Path, file: str, config: Mapping[str, Any]) -> None:
    found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ModelError(f"{path / file}: eos_token_id: expected a token id or a list of them, got {found!r}")


def _hub_snapshot(repo: str, dummy: bool) -> Path:
    """Local copy of a hub repository's model files (its cache serves repeated calls, also offline)."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [p for p in _HUB_FILES if not (dummy and p.endswith(".safetensors"))]
    try:
        return Path(
            snapshot_download(
                repo,
                allow_patterns=patterns,
                ignore_patterns=_HUB_LEFT_OUT,
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        )
    except GatedRepoError as error:
        raise ModelError(
            f"model: {repo} is gated: accept its terms on the hub and log in (`hf auth login` or HF_TOKEN)"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model: the hub has no {repo}, or it is private: check the spelling, or log in (HF_TOKEN)"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        why = (
            "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub cannot be reached ({_first_line(error)})"
        )
        raise ModelError(
            f"model: {repo} is not in the local hub cache and {why}; download it where there is a network and give "
            f"the directory, or use an embedded model: {', '.join(EMBEDDED_MODELS)}"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
