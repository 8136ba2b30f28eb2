"""Choice of a backend per op call, at trace time: in order of preference, every refusal with its reason."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pjengine.errors import ConfigError, KernelUnavailable

logger = logging.getLogger(__name__)

NAMES = ("mosaic", "triton", "reference")
HOPPER_SMS = 132  # of an H100 or H200 SXM
TILE_ROWS = 64  # of a Hopper warpgroup's product


@dataclasses.dataclass(frozen=True)
class Target:
    """The device a call is traced for.

    Attributes:
      compute_capability: 90 for Hopper; None where there is no NVIDIA GPU.
      cores: streaming multiprocessors; None where unknown.
      device_kind: such as "NVIDIA H200"; None where unknown.
    """

    platform: str
    compute_capability: int | None = None
    cores: int | None = None
    device_kind: str | None = None

    @property
    def sms(self) -> int:
        """Streaming multiprocessors; a Hopper's where unknown."""
        return self.cores or HOPPER_SMS


def current_target() -> Target:
    """The device that the code being traced will run on: the abstract mesh's, the default device, or the first one."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        hopper = any(name in abstract.device_kind for name in ("H100", "H200"))
        return Target("gpu", 90 if hopper else None, abstract.num_cores, abstract.device_kind)
    device: Any = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    capability = getattr(device, "compute_capability", None)
    if capability is None:
        return Target(device.platform)
    cores = getattr(device, "core_count", None)
    return Target(device.platform, int(str(capability).replace(".", "")), cores, device.device_kind)


def load_runtime(target: Target) -> None:
    """Lets XLA compile and load programs with Mosaic kernels that this process has not traced.

    Tracing imports what tells XLA where Mosaic's runtime library is; without it such a program fails with "Symbols not
    found: mosaic_gpu_launch_kernel" and hangs.
    """
    if target.compute_capability == 90:
        importlib.import_module("jax.experimental.mosaic.gpu")


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
      name: one of NAMES.
      refusal: (spec, target) -> why this backend cannot serve such a call there, or None if it can.
      module: holds the implementation; imported at its first use only, since GPU libraries are slow to import.
      function: its name in that module.
    """

    name: str
    refusal: Callable[[Any, Target], str | None]
    module: str
    function: str

    def load(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(self.module), self.function)


def accept(spec: object, target: Target) -> str | None:
    """The refusal function of a backend that serves everything everywhere."""
    return None


def select(op: str, requested: str, backends: Sequence[Backend], spec: Any, target: Target | None = None) -> Backend:
    """The backend that serves this call.

    Args:
      requested: a backend's name, or "auto": the first that does not refuse; where there is no GPU the reference.
      spec: AttentionSpec or KVWriteSpec.
      target: None: the current one.
    Raises:
      ConfigError: `requested` is no backend's name.
      KernelUnavailable: every candidate refuses; the message lists each reason.
    """
    chosen, refusals = choose(requested, backends, spec, target or current_target())
    if chosen is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
        raise KernelUnavailable(f"{op}: no backend for {spec} ({reasons}); choose another with --attention-backend")
    _log_once(op, chosen.name, tuple(refusals))
    return chosen


def choose(
    requested: str, backends: Sequence[Backend], spec: Any, target: Target
) -> tuple[Backend | None, list[tuple[str, str]]]:
    """As `select`, without logging: (backend or None, [(name, reason) of each that refused before it])."""
    if requested not in ("auto", *NAMES):
        raise ConfigError(f"attention_backend: expected auto, {', '.join(NAMES)}, got {requested!r}")
    refusals: list[tuple[str, str]] = []
    for name in NAMES if requested == "auto" else (requested,):
        backend = next((b for b in backends if b.name == name), None)
        if requested == "auto" and name != "reference" and target.compute_capability is None:
            continue
        reason = "not implemented for this op" if backend is None else backend.refusal(spec, target)
        if backend is not None and reason is None:
            return backend, refusals
        refusals.append((name, reason or ""))
    return None, refusals


@functools.cache
def _log_once(op: str, chosen: str, refusals: tuple[tuple[str, str], ...]) -> None:
    if refusals:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
        logger.warning("%s is served by %s (%s)", op, chosen, reasons)
    else:
        logger.info("%s is served by %s", op, chosen)
