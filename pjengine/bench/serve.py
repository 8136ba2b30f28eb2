"""`pjengine bench serve`: an open-loop load on any OpenAI-compatible server, sent by processes of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from pjengine.bench.serve_client import Call, Form, Load, refusal, run_client, send
from pjengine.bench.serve_http import Address, BadResponse, Connections
from pjengine.bench.serve_trace import Trace
from pjengine.bench.workloads import Item
from pjengine.errors import PJEngineError


class ServerUnusable(PJEngineError, RuntimeError):
    """The server cannot be reached, does not serve the model, or refuses the benchmark's kind of request."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a workload is sent.

    Attributes:
      model: as the server calls it.
      rate: requests per second, Poisson arrivals; math.inf: all at once.
      concurrency: most requests in flight.
      processes: that send, each with its share of requests and concurrency; no more than there are of either.
      timeout: seconds after which a request has failed.
      seed: of the arrivals.
    """

    address: Address
    form: Form
    model: str
    rate: float
    concurrency: int
    processes: int
    timeout: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Run:
    """traces: of all requests, in order of `due`. client_share: CPU share of the busiest client process: near 1, the
    client was the limit.
    """

    traces: list[Trace]
    client_share: float


def default_processes(concurrency: int) -> int:
    """One process per 256 streams, but no more than half of the CPUs: the server may need the others."""
    return max(1, min(-(-concurrency // 256), (os.cpu_count() or 1) // 2))


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start at which requests are due, the first at 0: a Poisson process of `rate` per second."""
    if math.isinf(rate):
        return [0.0] * count
    gaps = np.random.default_rng(seed).exponential(1 / rate, count - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


def choose_model(address: Address, model: str | None) -> str:
    """The model to ask for: `model`, if the server lists it; None: the only one that it lists.

    Raises: ServerUnusable.
    """
    served = asyncio.run(_served_models(address))
    if model is None and len(served) == 1:
        return served[0]
    if model is None or model not in served:
        wanted = f", not {model}" if model is not None else ""
        raise ServerUnusable(f"model: the server serves {', '.join(served) or 'nothing'}{wanted}; set --model")
    return model


async def _served_models(address: Address) -> list[str]:
    where = f"http{'s' if address.tls else ''}://{address.host}:{address.port}{address.prefix}"
    try:
        async with (
            asyncio.timeout(30),
            Connections(address) as connections,
            connections.request("GET", "/v1/models") as response,
        ):
            if response.status != 200:
                raise ServerUnusable(f"base_url: {where}/v1/models: {await refusal(response)}")
            return [str(card["id"]) for card in msgspec.json.decode(await response.read())["data"]]
    except TimeoutError as error:
        raise ServerUnusable(f"base_url: {where}/v1/models gave no answer in 30 s") from error
    except (OSError, BadResponse) as error:
        raise ServerUnusable(f"base_url: {where} cannot be reached: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ServerUnusable(f"base_url: {where}/v1/models is not OpenAI's list of models") from error


def probe(options: ServeOptions, item: Item) -> None:
    """Sends one short request first, so that what every request would meet is said once, before the run.

    Raises: ServerUnusable with the server's words.
    """
    short = Item(item.prompt_token_ids[:8], min(item.output_len, 2))
    call = Call(0.0, options.form.body(options.model, [short]), short.output_len)
    trace = Trace(due=0.0)
    load = Load(options.address, options.form.endpoint, [call], 1, options.timeout)

    async def once() -> None:
        async with Connections(options.address) as connections:
            await send(connections, load, call, trace)

    asyncio.run(once())
    if trace.error is not None:
        raise ServerUnusable(f"a first, short request failed: {trace.error}")


def serve(options: ServeOptions, work: Sequence[Item]) -> Run:
    """Sends a workload and waits for its end."""
    due = arrivals(-(-len(work) // options.form.texts), options.rate, options.seed)
    calls = options.form.calls(options.model, work, due)
    count = options.processes
    loads = [
        Load(
            options.address,
            options.form.endpoint,
            calls[i::count],
            options.concurrency // count + (i < options.concurrency % count),
            options.timeout,
        )
        for i in range(count)
    ]
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads' locks
    pipes = [context.Pipe() for _ in loads]
    processes = [
        context.Process(target=run_client, args=(theirs, load), daemon=True)
        for (_, theirs), load in zip(pipes, loads, strict=True)
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()  # so that a client that dies is an end of file here
    connections = [ours for ours, _ in pipes]
    for connection in connections:
        _receive(connection)
    start = time.monotonic() + 0.1
    for connection in connections:
        connection.send(start)
    found = [_receive(connection) for connection in connections]
    for process in processes:
        process.join()
    traces = sorted((trace for share, _ in found for trace in share), key=lambda trace: trace.due)
    seconds = max(trace.finished for trace in traces) - start
    return Run(traces, max(cpu for _, cpu in found) / seconds)


def _receive(connection: Any) -> Any:
    try:
        return connection.recv()
    except EOFError as error:
        raise RuntimeError("a client process died; its traceback is above") from error
