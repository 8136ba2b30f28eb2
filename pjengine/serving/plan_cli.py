"""`pjengine plan`: a model's share of a GPU's memory as a table, on a machine that needs no GPU."""

from __future__ import annotations

import dataclasses
import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pjengine.config import EngineConfig
from pjengine.errors import ConfigError
from pjengine.serving.cli_options import with_engine_options

if TYPE_CHECKING:
    from pjengine.device_plan import DevicePlan


@with_engine_options
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As `serve` takes it; a config.json is enough.")],
    config: EngineConfig,
    device: Annotated[str, typer.Option(metavar="NAME", help="h200, h100, a100, l40s, …")] = "h200",
    device_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Of a device that has no name here.", show_default=False)
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Devices that share the model.", min=1)] = 1,
    json: Annotated[str | None, typer.Option("--json", metavar="OUT", help="Write the plan in bytes.")] = None,
) -> None:
    """Print how a GPU's memory would be divided between weights, temporaries and KV cache. Needs no GPU."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # a GPU that is here is left alone
    from pjengine.device_plan import plan_device

    if device_memory is not None:
        device = f"a device of {device_memory:g} GiB"
    found = plan_device(config, _memory(device) if device_memory is None else device_memory, tensor_parallel)
    _show(config, device, tensor_parallel, found)
    if json is not None:
        document = {"model": config.model, "device": device, "tensor_parallel": tensor_parallel}
        try:
            Path(json).write_text(json_format.dumps(document | dataclasses.asdict(found), indent=1) + "\n", "utf-8")
        except OSError as error:
            raise ConfigError(f"json: {json} cannot be written ({error.strerror})") from error


def _memory(device: str) -> float:
    """GiB of a named device."""
    from pjengine.device_plan import DEVICES

    if device.lower() not in DEVICES:
        raise ConfigError(f"device: expected one of {', '.join(DEVICES)} (or set --device-memory), got {device!r}")
    return DEVICES[device.lower()]


def _show(config: EngineConfig, device: str, tensor_parallel: int, found: DevicePlan) -> None:
    from rich.console import Console
    from rich.table import Table

    where = f"each of {tensor_parallel} × {device}" if tensor_parallel > 1 else device
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in _rows(config, found):
        table.add_row(name, value)
    print(f"{config.model} in {found.dtype} on {where}")
    Console().print(table)
    print("Temporaries are the engine's estimate; it plans again if an executable needs more.")
    if tensor_parallel > 1:
        print("The engine does not run tensor-parallel yet: this is what each device would hold.")


def _rows(config: EngineConfig, found: DevicePlan) -> list[tuple[str, Any]]:
    memory, limits = found.memory, found.limits
    rows = [
        (f"budget ({_budget(config)})", _gib(memory.budget)),
        ("weights", _gib(memory.weights)),
        ("temporaries (estimate)", _gib(memory.temporaries)),
    ]
    if limits is None:
        left = memory.budget - memory.weights - memory.temporaries
        return [*rows, ("left", _gib(left)), ("longest text", f"{found.longest:,} tokens")]
    rows += [
        ("sampler and block tables", _gib(memory.tables)),
        ("KV cache", _gib(memory.cache)),
        ("KV cache per token", f"{found.kv_bytes_per_token / 1024:,.1f} KiB"),
        (f"pages of {limits.page_size} tokens", " + ".join(f"{pages:,}" for pages in memory.pages)),
        ("KV cache holds", f"{found.kv_tokens:,} tokens"),
        ("longest sequence", f"{found.longest:,} tokens"),
    ]
    for length, count in found.concurrent.items():
        rows.append((f"sequences of {length:,} tokens at once", f"{count:,}"))
    return [*rows, ("most that run at once (max_num_seqs)", f"{limits.max_num_seqs:,}")]


def _budget(config: EngineConfig) -> str:
    share = config.gpu_memory_utilization
    return f"{share:.0%} of the device" if share is not None else "all but what CUDA takes"


def _gib(size: int) -> str:
    return f"{size / (1 << 30):,.2f} GiB"
