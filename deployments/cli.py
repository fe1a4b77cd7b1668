"""The command line, `caravan`. Starts fast: whatever a command needs is imported in that command."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="caravan",
    help="Serve Llama models as pipelines of Ray actors: check a configuration, talk to a service, watch it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_METRICS = "http://127.0.0.1:8080/metrics"


@app.command(epilog="Example: caravan check ray_config.yaml")
def check(file: Annotated[Path, typer.Argument(help="the Serve configuration file")]) -> None:
    """Validate a whole Serve configuration, ours and Serve's part: a mistyped key anywhere is an error."""
    from deployments.check import check_file

    problems = check_file(file)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{file}: all good")


@app.command(epilog='Example: caravan chat --url http://127.0.0.1:8000 --system "Answer in one sentence."')
def chat(
    url: Annotated[str, typer.Option(help="where the service is")] = DEFAULT_URL,
    model: Annotated[str, typer.Option(help="model name; default: the one it serves")] = "",
    system: Annotated[str, typer.Option(help="system prompt")] = "",
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token")] = 0.7,
) -> None:
    """Talk to a running endpoint, streaming. An empty line or Ctrl-D ends it."""
    from deployments.chat_client import ChatFailed, Message, served_model, stream_chat

    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    try:
        model = model or served_model(url)
        typer.echo(f"{model} at {url}; an empty line ends it")
        while question := _ask():
            messages.append({"role": "user", "content": question})
            answer = ""
            for piece in stream_chat(url, model, messages, temperature=temperature):
                answer += piece
                typer.echo(piece, nl=False)
            typer.echo()
            messages.append({"role": "assistant", "content": answer})
    except ChatFailed as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


@app.command(
    epilog="Example: caravan top --metrics http://10.0.0.1:8080/metrics --metrics http://10.0.0.2:8080/metrics"
)
def top(
    metrics: Annotated[list[str] | None, typer.Option(help="metrics endpoint of a Ray node; repeat for more")] = None,
    interval: Annotated[float, typer.Option(help="seconds between looks")] = 2.0,
    once: Annotated[bool, typer.Option(help="print one view and leave")] = False,
) -> None:
    """Live view of every replica and stage: tokens/s, queues, KV room, busy and waiting share of each stage."""
    from ops.top import run

    try:
        raise typer.Exit(run(metrics or [DEFAULT_METRICS], interval, once))
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@app.command(epilog="Example: caravan dashboard --output caravan.json, then import the file in Grafana")
def dashboard(
    output: Annotated[Path | None, typer.Option(help="file to write; default: standard output")] = None,
) -> None:
    """Print the Grafana dashboard as JSON."""
    from ops.dashboard import dashboard_json

    if output is None:
        sys.stdout.write(dashboard_json())
    else:
        output.write_text(dashboard_json(), "utf-8")


bench = typer.Typer(
    help="Measure: offline (the engine alone), serve (over HTTP), load (reading a checkpoint).", no_args_is_help=True
)
app.add_typer(bench, name="bench")


@bench.callback()
def bench_() -> None:
    """Measure."""


@bench.command(epilog="Example: caravan bench offline deployments/configs/llama2-7b-dummy.yaml --batch-sizes 1,64")
def offline(
    config: Annotated[Path, typer.Argument(help="the Serve configuration whose engine to measure")],
    requests: Annotated[int, typer.Option(help="how many requests of the fixed list; 0: none")] = 1200,
    batch_sizes: Annotated[str, typer.Option(help="also ms per token of these batches, e.g. 1,64")] = "",
    output: Annotated[Path | None, typer.Option(help="write the result as JSON here")] = None,
) -> None:
    """The engine alone in a Ray of its own: a fixed list of requests at once, and single batches."""
    import json

    import ray
    import yaml

    from deployments.config import ConfigError, parse_app_config
    from deployments.offline import bench_offline, offline_table

    try:
        app_config = parse_app_config(yaml.safe_load(config.read_text("utf-8"))["applications"][0]["args"])
    except (OSError, ConfigError) as error:
        typer.echo(f"{config}: {error}", err=True)
        raise typer.Exit(1) from None
    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    result = bench_offline(app_config, requests, [int(size) for size in batch_sizes.split(",") if size])
    ray.shutdown()
    from rich.console import Console

    Console().print(offline_table(f"{app_config.model.name}: {config}", result))
    result_ = {**result, "list": {k: v for k, v in result.get("list", {}).items() if k != "trace"}}
    print(json.dumps(result_))
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


@bench.command(epilog="Example: caravan bench serve --concurrency 16,64,256 --requests 600 --processes 4")
def serve(
    url: Annotated[str, typer.Option(help="where the service is")] = DEFAULT_URL,
    requests: Annotated[int, typer.Option(help="how many requests of the fixed list, for each concurrency")] = 100,
    concurrency: Annotated[str, typer.Option(help="streams at once; several, like 1,8,64, make a sweep")] = "8",
    rate: Annotated[float, typer.Option(help="requests a second that arrive by themselves; 0: closed loop")] = 0.0,
    processes: Annotated[int, typer.Option(help="client processes; one drives about 2,000 tokens a second")] = 1,
    vocab_size: Annotated[int, typer.Option(help="prompts are random ids below this")] = 32_000,
    max_tokens: Annotated[int, typer.Option(help="cut prompts and outputs of the list to this length; 0: leave")] = 0,
    output: Annotated[Path | None, typer.Option(help="write the results as JSON here")] = None,
) -> None:
    """A running service over HTTP, streamed, on a fixed list of lengths: TTFT, inter-token and end-to-end latency."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    from deployments.chat_client import ChatFailed, served_model
    from ops import load, workload

    try:
        model = served_model(url)
    except ChatFailed as error:
        fail(str(error))
    longest = max_tokens or workload.LONGEST
    bodies = [
        {
            "model": model,
            "prompt": workload.prompt(i, min(prompt, longest), vocab_size),
            "max_tokens": min(new, longest),
            "temperature": 0,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        for i, (prompt, new) in enumerate(workload.lengths(requests))
    ]
    results = []
    for at_once in (int(n) for n in concurrency.split(",")):
        summary = load.run_in_processes(f"{url}/v1/completions", bodies, at_once, min(processes, at_once), rate)
        Console().print(summary.table(f"{model} at {url}, {at_once} streams" + (f", {rate:g}/s" if rate else "")))
        results.append({"concurrency": at_once, "rate": rate, "processes": processes, **asdict(summary)})
    print(json.dumps(results))
    if output is not None:
        output.write_text(json.dumps(results, indent=1) + "\n")
    if any(result["failed"] for result in results):
        fail("some requests failed")


@bench.command(epilog="Example: caravan bench load --gb 2 --stages 4")
def load(
    gb: Annotated[float, typer.Option(help="size of the checkpoint that is written for it")] = 2.0,
    stages: Annotated[int, typer.Option(help="stages that share it")] = 4,
    directory: Annotated[Path | None, typer.Option(help="where to write it; default: a temporary directory")] = None,
    output: Annotated[Path | None, typer.Option(help="write the result as JSON here")] = None,
) -> None:
    """Bytes read, peak memory and time of stages that read their shares, beside a plain safetensors read."""
    import json
    import tempfile

    from rich.console import Console

    from deployments.bench_load import bench_load, load_table

    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        result = bench_load(gb, stages, Path(temporary))
    Console().print(load_table(result))
    print(json.dumps(result))
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


@app.command(epilog="Example: caravan inspect /models/llama-2-7b --stages 2")
def inspect(
    path: Annotated[str, typer.Argument(help="checkpoint file or directory, pkg:module/file, or shape:llama-2-70b")],
    stages: Annotated[int, typer.Option(help="also show a split into this many stages")] = 2,
    dtype: Annotated[
        str, typer.Option(help="type of the weights when served: bfloat16, float16 or float32")
    ] = "bfloat16",
    prompt_format: Annotated[str, typer.Option(help="as in model.prompt_format")] = "auto",
) -> None:
    """What a checkpoint is: family, shape, types, context, prompt format with an example, and its split into stages."""
    from rich.console import Console

    from deployments.inspection import inspect as inspected
    from model.weights import resolve_path
    from model.weights.sharded import ITEM_SIZES

    if dtype not in ITEM_SIZES:
        fail(f"--dtype {dtype}: must be one of {', '.join(ITEM_SIZES)}")
    try:
        Console(soft_wrap=True).print(inspected(resolve_path(path), stages, dtype, prompt_format))
    except ValueError as error:
        fail(str(error))


@app.command(
    epilog="Example: caravan shard /models/llama-2-70b --stages 4 --out /models/llama-2-70b-4 --dtype bfloat16"
)
def shard(
    path: Annotated[str, typer.Argument(help="checkpoint file or directory, or pkg:module/file")],
    out: Annotated[Path, typer.Option(help="a new directory")],
    stages: Annotated[int, typer.Option(help="number of stages")],
    split: Annotated[
        str, typer.Option(help="layers per stage, e.g. 41,39; default: balanced, as pipeline.split auto")
    ] = "",
    dtype: Annotated[str, typer.Option(help="store as bfloat16, float16 or float32; default: as it is read")] = "",
) -> None:
    """Cut a checkpoint into one file per stage, so that a node needs only its own; each tensor gets a checksum."""
    import torch
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from model.config import split_layers
    from model.weights import open_checkpoint, resolve_path
    from model.weights.sharded import ITEM_SIZES, stage_bytes, write_shards

    if dtype and dtype not in ITEM_SIZES:
        fail(f"--dtype {dtype}: must be one of {', '.join(ITEM_SIZES)}")
    kind = getattr(torch, dtype) if dtype else None
    try:
        source = resolve_path(path)
        checkpoint = open_checkpoint(source)
        parts = split_layers(checkpoint.config, stages, [int(n) for n in split.split(",")] if split else None)
        names = [name for part in parts for name in part.tensor_names(checkpoint.config)]
        total = stage_bytes(checkpoint, names, kind)
        with Progress(
            "{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        ) as bar:
            task = bar.add_task(f"{stages} stages to {out}", total=total)
            write_shards(source, checkpoint, parts, out, kind, lambda count: bar.advance(task, count))
    except ValueError as error:
        fail(str(error))
    typer.echo(
        f"{out}: give it as model.path, with pipeline.stages: {stages}" + (f" and split: [{split}]" if split else "")
    )


def fail(message: str) -> NoReturn:
    """One plain sentence and exit status 1."""
    typer.echo(message, err=True)
    raise typer.Exit(1)


@app.command(epilog="Example: caravan version")
def version() -> None:
    """Print the version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        typer.echo(installed("caravan"))
    except PackageNotFoundError:
        typer.echo("unknown: the package is not installed")


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
