"""`pjengine bench …`: the same measurements for every user, each beside what the device can do."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from pjengine.config import EngineConfig
from pjengine.errors import ConfigError
from pjengine.serving.cli_options import reported_errors, with_engine_options

if TYPE_CHECKING:
    from pjengine.bench.roofline import Roofline

app = typer.Typer(
    help="Measure this engine: every figure beside what the device can do.", no_args_is_help=True, rich_markup_mode=None
)

Model = Annotated[str, typer.Option("--model", metavar="MODEL", help="As `pjengine serve` takes it.")]
Json = Annotated[str | None, typer.Option("--json", metavar="OUT", help="Write versions, device, config and rows.")]


@app.command()
@with_engine_options
def decode(
    model: Model,
    config: EngineConfig,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,64",
    context: Annotated[int, typer.Option(help="Prompt tokens of each sequence.", min=1)] = 128,
    steps: Annotated[int, typer.Option(help="Steps to time.", min=1)] = 128,
    sampling: Annotated[
        bool, typer.Option("--sampling", help="Top-p 0.9, top-k 50 and penalties on every request.")
    ] = False,
    json: Json = None,
) -> None:
    """Milliseconds per decode step."""
    sizes = _counts("batch", batch)

    def rows(engine: Any, roofline: Roofline) -> list[dict[str, Any]]:
        from pjengine.bench.generation import GREEDY, check_decode, decode
        from pjengine.sampling_params import SamplingParams

        params = GREEDY
        if sampling:
            params = SamplingParams(
                top_p=0.9,
                top_k=50,
                presence_penalty=0.1,
                frequency_penalty=0.1,
                repetition_penalty=1.1,
                ignore_eos=True,
            )
        for size in sizes:
            check_decode(engine, size, context, steps)
        return [decode(engine, size, context, steps, roofline, params) for size in sizes]

    options = {"batch": batch, "context": context, "steps": steps, "sampling": sampling}
    _measure("decode", config, options, rows, json)


@app.command()
@with_engine_options
def prefill(
    model: Model,
    config: EngineConfig,
    shapes: Annotated[str, typer.Option(help="LENGTHxCOUNT pairs, separated by commas.")] = "512x64,2048x32",
    json: Json = None,
) -> None:
    """Prompt tokens per second."""
    pairs = [_integers(shape, "x") for shape in shapes.split(",")]
    if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise ConfigError(f"shapes: expected LENGTHxCOUNT pairs such as 512x64,2048x32, got {shapes!r}")

    def rows(engine: Any, roofline: Roofline) -> list[dict[str, Any]]:
        from pjengine.bench.generation import check_prefill, prefill

        for length, _ in pairs:
            check_prefill(engine, length)
        return [prefill(engine, count, length, roofline) for length, count in pairs]

    _measure("prefill", config, {"shapes": shapes}, rows, json)


@app.command()
@with_engine_options
def throughput(
    model: Model,
    config: EngineConfig,
    workload: Annotated[str, typer.Option(help="chat, or a file of JSON lines (docs/benchmarks.md).")] = "chat",
    json: Json = None,
) -> None:
    """A whole workload offline, all requests at once."""
    from pjengine.bench.workloads import check, read

    work = read(workload, _vocab_size(config))
    if any(item.output_len == 0 for item in work):
        raise ConfigError(f"workload: {workload}: every line needs an output_len of at least 1")

    def rows(engine: Any, roofline: Roofline) -> list[dict[str, Any]]:
        from pjengine.bench.generation import throughput

        check(workload, work, engine.info.max_model_len, engine.info.vocab_size)
        return [throughput(engine, work)]

    _measure("throughput", config, {"workload": workload}, rows, json)


@app.command()
@with_engine_options
def embed(
    model: Model,
    config: EngineConfig,
    workload: Annotated[
        str, typer.Option(help="queries, docs, or a file of JSON lines (docs/benchmarks.md).")
    ] = "queries",
    plot: Annotated[
        str | None,
        typer.Option(metavar="OUT.png", help="Compare ways of batching under load, and draw them (extra `bench`)."),
    ] = None,
    json: Json = None,
) -> None:
    """Embeddings of a whole workload offline, the latency of a single one, and the latency under load."""
    if plot is not None:
        with reported_errors():
            from pjengine.bench import report
            from pjengine.bench.plots import require_matplotlib

            require_matplotlib(plot)  # before the time is spent
            report.check_writable(plot, "plot")
    from pjengine.bench.workloads import check, read

    prompts = [dataclasses.replace(item, output_len=0) for item in read(workload, _vocab_size(config))]

    def rows(engine: Any, roofline: Roofline) -> list[dict[str, Any]]:
        from pjengine.bench.embedding import embed
        from pjengine.bench.embedding_load import batching

        check(workload, prompts, engine.info.max_model_len, engine.info.vocab_size)
        row = embed(engine, prompts)
        if plot is not None:
            row |= batching(engine, prompts, plot, f"{config.model}, {workload}, {engine.info.device}")
        return [row]

    _measure("embed", config, {"workload": workload}, rows, json)


@app.command()
def kernels(json: Json = None) -> None:
    """Every attention kernel over a grid of shapes, as a share of what this GPU can do, and against cuDNN."""
    with reported_errors():
        from pjengine.bench import report
        from pjengine.bench.kernels import main

        report.check_writable(json)
        main(json)


@app.command()
@with_engine_options
def host(
    model: Model,
    config: EngineConfig,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "64,256,512",
    steps: Annotated[int, typer.Option(help="Steps to time.", min=1)] = 400,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    json: Json = None,
) -> None:
    """Milliseconds that the host spends on a decode step, with a device that does nothing."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # a GPU that is here is left alone
    from pjengine.bench import report
    from pjengine.bench.host import host
    from pjengine.sampling_params import SamplingParams

    report.check_writable(json)
    params = SamplingParams(temperature=temperature, max_tokens=None, ignore_eos=True)
    rows = [host(config, size, steps, params) for size in _counts("batch", batch)]
    report.show(f"host, {config.model}", rows)
    if json is not None:
        options = {"batch": batch, "steps": steps, "temperature": temperature}
        document = {"device": "cpu", "config": dataclasses.asdict(config), "options": options, "rows": rows}
        report.write(json, "host", document)


@app.command()
@with_engine_options
def startup(model: Model, config: EngineConfig, json: Json = None) -> None:
    """Seconds from the start of a process to the first token: cold, then with the compile cache that it left."""
    if config.compile_cache is not None:
        raise ConfigError("compile_cache: this benchmark uses an empty one of its own; leave the flag out")
    from pjengine.bench import report
    from pjengine.bench.startup import measure

    report.check_writable(json)
    device, ceiling, rows = measure(config)
    print(f"{device}: {ceiling}")
    phases = [{"seconds": phase} | {row["start"]: row[phase] for row in rows} for phase in rows[0] if phase != "start"]
    report.show(f"startup, {config.model}", phases)
    if json is not None:
        report.save(json, "startup", device, ceiling, config, {}, rows)


@app.command()
def serve(
    base_url: Annotated[str, typer.Option(help="Of the server, with or without /v1.")] = "http://localhost:8000",
    model: Annotated[
        str | None,
        typer.Option(help="As the server calls it; by default the only one it serves.", show_default=False),
    ] = None,
    workload: Annotated[
        str, typer.Option(help="chat, queries, docs, or a file of JSON lines (docs/benchmarks.md).")
    ] = "chat",
    request_rate: Annotated[
        str, typer.Option(metavar="R|inf", help="Poisson arrivals per second; inf: all at once.")
    ] = "inf",
    concurrency: Annotated[int, typer.Option(help="Most requests in flight.", min=1)] = 1000,
    endpoint: Annotated[str, typer.Option(metavar="completions|chat|embeddings")] = "completions",
    texts_per_request: Annotated[int, typer.Option(help="Embeddings: texts that share a request.", min=1)] = 1,
    send_text: Annotated[
        bool, typer.Option("--send-text", help="Embeddings: words, which the server tokenizes, in place of token ids.")
    ] = False,
    encoding_format: Annotated[str, typer.Option(metavar="float|base64", help="Embeddings: of the answers.")] = "float",
    repeat: Annotated[int, typer.Option(help="Send the workload so many times over.", min=1)] = 1,
    goodput: Annotated[
        str | None,
        typer.Option(help="Limits of a good request in ms: ttft:200,tpot:50,e2el:5000.", show_default=False),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Better set in the environment.", show_default=False)
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="By default one per 256 of concurrency, at most half the CPUs.", min=1, show_default=False),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Prompts are random token ids below this.", min=8)] = 32000,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals; another one misses the prefix cache.", min=0)] = 3,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request has failed.", min=0.001)] = 600.0,
    json: Json = None,
) -> None:
    """An open-loop load on any OpenAI-compatible server; exit code 1 if a request failed."""
    with reported_errors():
        from pjengine.bench import report, serve_report
        from pjengine.bench.serve import ServeOptions, choose_model, default_processes, probe, serve
        from pjengine.bench.serve_client import Form
        from pjengine.bench.serve_http import Address
        from pjengine.bench.serve_trace import parse_limits, summarize
        from pjengine.bench.workloads import read

        report.check_writable(json)
        if not timeout < math.inf:
            raise ConfigError(f"timeout: expected seconds, got {timeout}")
        form = Form(cast(Any, endpoint), texts_per_request, send_text, encoding_format)
        limits = None if goodput is None else parse_limits(goodput)
        address = Address.parse(base_url, api_key)
        rate = _rate(request_rate)
        work = read(workload, vocab_size, seed) * repeat
        if endpoint != "embeddings" and any(item.output_len == 0 for item in work):
            raise ConfigError(f"workload: {workload}: every line needs an output_len of at least 1")
        options = ServeOptions(
            address=address,
            form=form,
            model=choose_model(address, model),
            rate=rate,
            concurrency=concurrency,
            processes=min(processes or default_processes(concurrency), concurrency, -(-len(work) // form.texts)),
            timeout=timeout,
            seed=seed,
        )
        probe(options, work[0])
        found = serve(options, work)
        summary = summarize(found.traces, limits)
        serve_report.show(base_url, workload, options, summary, found.client_share)
        if json is not None:
            sent = {"base_url": base_url, "workload": workload, "repeat": repeat, "vocab_size": vocab_size}
            serve_report.save(json, sent, options, limits, summary, found.client_share)
        if summary.failed:
            raise typer.Exit(1)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise ConfigError(f"request_rate: expected requests per second above 0, or inf, got {text!r}")
    return rate


def _measure(
    name: str,
    config: EngineConfig,
    options: dict[str, Any],
    rows: Callable[[Any, Roofline], list[dict[str, Any]]],
    json: str | None,
) -> None:
    """Measures the device, then the engine; shows and saves the rows. options: as they were given, for the file."""
    with reported_errors():
        from pjengine.bench import report, roofline
        from pjengine.factory import generates, make_engine, prepare_device
        from pjengine.heap import freeze_heap

        report.check_writable(json)
        # Repeated prompts must cost what they cost.
        config = dataclasses.replace(config, enable_prefix_caching=False)
        prepare_device(config)
        if generates(config) == (name == "embed"):
            raise ConfigError(
                f"task: {config.model} generates text; for embeddings of it set --task embed"
                if name == "embed"
                else f"task: {config.model} embeds or classifies, and `pjengine bench {name}` measures generating"
            )
        ceiling = roofline.measure()  # before the engine takes the memory
        engine = make_engine(config, progress=sys.stderr.isatty())
        freeze_heap()  # as a server does
        print(f"{engine.info.device}: {ceiling}")
        found = rows(engine, ceiling)
        report.show(f"{name}, {config.model}", found)
        if json is not None:
            report.save(json, name, engine.info.device, ceiling, config, options, found)


def _vocab_size(config: EngineConfig) -> int:
    """The model's, from its config alone: a workload that is wrong is refused before the time is spent."""
    from pjengine.models.loading import model_of
    from pjengine.models.sources import resolve

    return int(model_of(resolve(config.model, config.load_format))[1].vocab_size)


def _counts(field: str, text: str) -> list[int]:
    counts = _integers(text, ",")
    if not counts or min(counts) < 1:
        raise ConfigError(f"{field}: expected counts of at least 1 separated by commas, got {text!r}")
    return counts


def _integers(text: str, separator: str) -> list[int]:
    """Empty if a part is none."""
    try:
        return [int(part) for part in text.split(separator)]
    except ValueError:
        return []
