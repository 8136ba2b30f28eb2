"""How a load on a server is shown and kept."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from rich.console import Console
from rich.table import Table

from pjengine.bench import report
from pjengine.bench.serve import ServeOptions
from pjengine.bench.serve_trace import Summary

_NAMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
    "queued": "wait for a free place",
}
_MOST_ERRORS = 10  # kinds shown; the file has all
_BUSY = 0.9  # CPU share from which on the client is suspected of being the limit


def show(base_url: str, workload: str, options: ServeOptions, summary: Summary, client_share: float) -> None:
    """Prints throughput, latencies and, in any case, what failed."""
    console = Console()
    totals = Table(show_header=False)
    totals.add_column()
    totals.add_column(justify="right")
    totals.add_row("completed / failed requests", f"{summary.completed:,} / {summary.failed:,}")
    totals.add_row("seconds", f"{summary.seconds:,.2f}")
    totals.add_row("input / output tokens", f"{summary.prompt_tokens:,} / {summary.output_tokens:,}")
    for name, rate in summary.rates.items():
        totals.add_row(f"{name} per second", f"{rate:,.2f}")
    totals.add_row("client's CPU share", f"{client_share:.0%} of the busiest of {options.processes}")
    print(f"serve, {options.model} at {base_url}, {workload}")
    console.print(totals)
    if summary.latencies:
        table = Table(title="ms")
        table.add_column()
        for name in ("mean", "median", "p99"):
            table.add_column(name, justify="right")
        for name, values in summary.latencies.items():
            table.add_row(_NAMES[name], *(f"{value:,.2f}" for value in values.values()))
        console.print(table)
    if client_share > _BUSY:
        print("The client was busy all the time: its figures are its own, not the server's; raise --processes.")
    if summary.early:
        print(f"{summary.early} answers ended before the length asked for: the server does not honour ignore_eos.")
    for error, count in itertools.islice(summary.errors.items(), _MOST_ERRORS):
        print(f"failed: {count} × {error}")
    if len(summary.errors) > _MOST_ERRORS:
        print(f"failed: {len(summary.errors) - _MOST_ERRORS} kinds more")


def save(
    path: str,
    sent: dict[str, Any],
    options: ServeOptions,
    limits: dict[str, float] | None,
    summary: Summary,
    client_share: float,
) -> None:
    """Writes the figures with what they were measured with; no API key. sent: where to and what, beside the options."""
    fields = dataclasses.asdict(options.form)
    fields |= {
        f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in ("address", "form")
    }
    config = fields | sent | {"goodput": limits, "rate": str(options.rate)}
    rows = [dataclasses.asdict(summary) | {"client_share": client_share}]
    report.write(path, "serve", {"config": config, "rows": rows})
