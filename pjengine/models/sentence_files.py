"""What a sentence-transformers directory says beside the model: modules.json, its modules' configs, its prompts.

Formats: https://sbert.net/docs/sentence_transformer/usage/custom_models.html.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pjengine.errors import ModelError
from pjengine.models.json_files import read_json

_POOLING_MODES = {  # sentence-transformers 6 names it in `pooling_mode`, older ones set a field
    "cls": ("cls", "pooling_mode_cls_token"),
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "max": ("max", "pooling_mode_max_tokens"),
    "mean_sqrt_len_tokens": ("mean_sqrt_len", "pooling_mode_mean_sqrt_len_tokens"),
    "weightedmean": ("weightedmean", "pooling_mode_weightedmean_tokens"),
    "lasttoken": ("last", "pooling_mode_lasttoken"),
}
_DENSE_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
}
_SCORE_ACTIVATIONS = {"Identity": "identity", "Sigmoid": "sigmoid", "Softmax": "softmax"}
_UNLIMITED = 10**9  # transformers writes 1e30 for none
_KINDS = ("Transformer", "Pooling", "Dense", "Normalize", "LogitScore")


@dataclasses.dataclass(frozen=True)
class DenseFile:
    """A Dense module behind the pooling: weights in `folder`, a linear layer and its activation (as `heads.Dense`)."""

    folder: str
    inputs: int
    outputs: int
    activation: str
    bias: bool


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How a sentence-transformers model makes one vector of a text.

    Attributes:
      mode: one of `pooling.POOLINGS`.
      normalize: the vector is scaled to length 1.
      max_seq_length: longer texts are cut to this many tokens, special ones included; None: the model's own limit.
      dense: layers between the pooling and the normalisation.
    """

    mode: str
    normalize: bool
    max_seq_length: int | None
    dense: tuple[DenseFile, ...] = ()


@dataclasses.dataclass(frozen=True)
class SentenceFiles:
    """The parts that a directory has; the default is one without such files.

    Attributes:
      pooling: of an embedder, else None.
      prompts: texts to put before a text, by name; default_prompt: the one for texts that name none.
      score_tokens: of a reranker that scores by a language model's logits: the ids of its true and, where it has one,
        of its false token.
      activation: one of `pjengine.activations.ACTIVATIONS`, where a cross-encoder names its own.
      max_seq_length: as in Pooling, of a cross-encoder too.
    """

    pooling: Pooling | None = None
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None
    score_tokens: tuple[int, ...] = ()
    activation: str | None = None
    max_seq_length: int | None = None


def read_sentence_files(path: Path, config: Mapping[str, Any]) -> SentenceFiles:
    """Reads a model directory. config: its config.json. ModelError names a file and field that cannot be honoured."""
    modules = _modules(path)
    settings = read_json(path / "config_sentence_transformers.json", dict) or {}
    prompts, default_prompt = _prompts(path, settings)
    longest = _max_seq_length(path, modules)
    score = [folder for kind, folder in modules if kind == "LogitScore"]
    return SentenceFiles(
        pooling=_pooling(path, modules, longest, prompts),
        prompts=prompts,
        default_prompt=default_prompt,
        score_tokens=_score_tokens(path / score[0] / "config.json") if score else (),
        activation=_score_activation(settings, config),
        max_seq_length=longest,
    )


def _modules(path: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each module of modules.json, in order; none where there is no such file."""
    modules = read_json(path / "modules.json", list) or []
    found = [(str(m.get("type", "")).rpartition(".")[2], m.get("path", "")) for m in modules if isinstance(m, dict)]
    for kind, _ in found:
        if kind not in _KINDS:
            raise ModelError(f"{path / 'modules.json'}: {kind!r} is not supported; {', '.join(_KINDS)} are")
    order = [_KINDS.index(kind) for kind, _ in found]
    if order != sorted(order) or ({"Dense", "Normalize"} & dict(found).keys() and "Pooling" not in dict(found)):
        names = ", ".join(kind for kind, _ in found)
        raise ModelError(f"{path / 'modules.json'}: expected the order {', '.join(_KINDS[:4])}, got {names}")
    return found


def _max_seq_length(path: Path, modules: list[tuple[str, str]]) -> int | None:
    """Older versions write it to sentence_bert_config.json; since 5.4 it is the tokenizer's."""
    folder = next((folder for kind, folder in modules if kind == "Transformer"), None)
    if folder is None:
        return None
    limits = read_json(path / folder / "sentence_bert_config.json", dict) or {}
    if limits.get("max_seq_length"):
        return int(limits["max_seq_length"])
    found = (read_json(path / "tokenizer_config.json", dict) or {}).get("model_max_length")
    return int(found) if found and found < _UNLIMITED else None


def _pooling(
    path: Path, modules: list[tuple[str, str]], max_seq_length: int | None, prompts: Mapping[str, str]
) -> Pooling | None:
    folder = next((folder for kind, folder in modules if kind == "Pooling"), None)
    if folder is None:
        return None
    file = path / folder / "config.json"
    config = _required(file, "Pooling")
    if any(prompts.values()) and config.get("include_prompt", True) is False:
        raise ModelError(
            f"{file}: include_prompt: expected true, got false; pooling without the prompt's tokens is not implemented"
        )
    normalize = [path / folder / "config.json" for kind, folder in modules if kind == "Normalize"]
    for normalize_file in normalize:
        _check_names(normalize_file, read_json(normalize_file, dict) or {})
    return Pooling(
        _pooling_mode(file, config),
        normalize=bool(normalize),
        max_seq_length=max_seq_length,
        dense=tuple(_dense(path, folder) for kind, folder in modules if kind == "Dense"),
    )


def _pooling_mode(file: Path, config: Mapping[str, Any]) -> str:
    if "pooling_mode" in config:
        name = config["pooling_mode"]
        if not isinstance(name, str) or name not in _POOLING_MODES:
            raise ModelError(f"{file}: pooling_mode: expected one of {', '.join(_POOLING_MODES)}, got {name!r}")
        return _POOLING_MODES[name][0]
    fields = {field: mode for mode, field in _POOLING_MODES.values()}
    modes = [field for field, value in config.items() if field.startswith("pooling_mode_") and value]
    if len(modes) != 1 or modes[0] not in fields:
        raise ModelError(f"{file}: expected exactly one of {', '.join(fields)} to be set, got {modes or 'none'}")
    return fields[modes[0]]


def _dense(path: Path, folder: str) -> DenseFile:
    file = path / folder / "config.json"
    config = _required(file, "Dense")
    _check_names(file, config)
    if config.get("use_residual", False):
        raise ModelError(f"{file}: use_residual: expected false, got {config['use_residual']!r}")
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if activation not in _DENSE_ACTIVATIONS:
        raise ModelError(
            f"{file}: activation_function: expected one of {', '.join(_DENSE_ACTIVATIONS)}, got {activation!r}"
        )
    return DenseFile(
        folder,
        inputs=_count(file, config, "in_features", 1),
        outputs=_count(file, config, "out_features", 1),
        activation=_DENSE_ACTIVATIONS[activation],
        bias=bool(config.get("bias", True)),
    )


def _score_tokens(file: Path) -> tuple[int, ...]:
    config = _required(file, "LogitScore")
    fields = ["true_token_id", "false_token_id"]
    if config.get("false_token_id") is None:
        fields.pop()
    return tuple(_count(file, config, field, 0) for field in fields)


def _check_names(file: Path, config: Mapping[str, Any]) -> None:
    """ModelError unless a module reads and writes the text's vector."""
    for field in ("module_input_name", "module_output_name"):
        if config.get(field) not in (None, "sentence_embedding"):
            raise ModelError(f"{file}: {field}: expected 'sentence_embedding', got {config[field]!r}")


def _count(file: Path, config: Mapping[str, Any], field: str, least: int) -> int:
    value = config.get(field)
    if type(value) is not int or value < least:
        raise ModelError(f"{file}: {field}: expected a whole number from {least} on, got {value!r}")
    return value


def _prompts(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    file = path / "config_sentence_transformers.json"
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ModelError(f"{file}: prompts: expected an object of texts by name, got {prompts!r:.80}")
    if default is not None and default not in prompts:
        raise ModelError(
            f"{file}: default_prompt_name: expected one of {', '.join(prompts) or 'no'} prompts, got {default!r}"
        )
    return prompts, default


def _score_activation(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """A cross-encoder's own activation, wherever the versions of sentence-transformers wrote it."""
    nested = config.get("sentence_transformers")
    found = (
        settings.get("activation_fn")
        or (nested.get("activation_fn") if isinstance(nested, dict) else None)
        or config.get("sbert_ce_default_activation_function")
    )
    if found is None:
        return None
    package, _, name = str(found).rpartition(".")
    if not package.startswith("torch.nn") or name not in _SCORE_ACTIVATIONS:
        raise ModelError(f"activation_fn: expected torch.nn's {', '.join(_SCORE_ACTIVATIONS)}, got {found!r}")
    return _SCORE_ACTIVATIONS[name]


def _required(file: Path, kind: str) -> dict[str, Any]:
    config = read_json(file, dict)
    if config is None:
        raise ModelError(f"{file}: missing, but modules.json lists a {kind} module; fetch the model again")
    return config
