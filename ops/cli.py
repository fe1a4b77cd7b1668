"""The command line, `caravan`. Starts fast: whatever a command needs is imported in that command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ops.bench.cache import copies
from ops.bench.cli import bench
from ops.bench.options import DEFAULT_URL, fail
from ops.chaos.command import chaos
from ops.interrupt import end_on_signals
from ops.preflight.command import preflight

app = typer.Typer(
    name="caravan",
    help="Serve Llama models as pipelines of Ray actors: check a configuration, talk to a service, watch it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
bench.command(name="copies", epilog="Example: caravan bench copies my.yaml --tokens 3500")(copies)
app.add_typer(bench, name="bench")
app.command(name="chaos", epilog="Example: caravan chaos --faults stage,engine,node --requests 1000 --streams 64")(
    chaos
)
app.command(name="preflight", epilog="Example: caravan preflight my_config.yaml, on a node of the cluster")(preflight)

DEFAULT_METRICS = "http://127.0.0.1:8080/metrics"


@app.command(epilog="Example: caravan check ray_config.yaml")
def check(
    file: Annotated[Path, typer.Argument(help="the Serve configuration file")],
    files: Annotated[bool, typer.Option("--files/--no-files", help="whether its checkpoint must be here")] = True,
    gpu: Annotated[str, typer.Option(help="what stages will run on, as Ray calls it: H200, H100, A100-80G")] = "",
) -> None:
    """Validate a whole Serve configuration, ours and Serve's part: a mistyped key anywhere is an error."""
    from deployments.check import check_file

    problems = check_file(file, files, gpu or None)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{file}: all good")


@app.command(epilog="Example: caravan diff deployed.yaml ray_config.yaml, before serve deploy ray_config.yaml")
def diff(
    old: Annotated[Path, typer.Argument(help="the configuration that runs")],
    new: Annotated[Path, typer.Argument(help="the one to be deployed")],
) -> None:
    """Say what deploying NEW over OLD will do: nothing, change in place, replace gateways, replace pipelines."""
    from deployments.config import ConfigError
    from deployments.diff import SAYS, diff_files, worst

    try:
        changes = diff_files(old, new)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    for change in changes:
        typer.echo(str(change))
    typer.echo(f"In all, deploying {new} {SAYS[worst(changes)]}.")


@app.command(epilog='Example: caravan chat --url http://127.0.0.1:8000 --system "Answer in one sentence."')
def chat(
    url: Annotated[str, typer.Option(help="where the service is")] = DEFAULT_URL,
    model: Annotated[str, typer.Option(help="model name; default: the one it serves")] = "",
    system: Annotated[str, typer.Option(help="system prompt")] = "",
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token")] = 0.7,
) -> None:
    """Talk to a running endpoint, streaming. An empty line or Ctrl-D ends it."""
    from ops.chat_client import ChatFailed, Message, served_model, stream_chat

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


@app.command(epilog="Example: caravan batch questions.jsonl answers.jsonl --at-once 64")
def batch(
    requests: Annotated[Path, typer.Argument(help="OpenAI's batch lines: custom_id, method, url, body")],
    results: Annotated[Path, typer.Argument(help="where answers go; what stands there is not asked again")],
    url: Annotated[str, typer.Option(help="where the service is")] = DEFAULT_URL,
    at_once: Annotated[int, typer.Option(help="requests at once", min=1)] = 32,
    tries: Annotated[int, typer.Option(help="of a request that the service puts off", min=1)] = 10,
    in_order: Annotated[bool, typer.Option(help="answers in the order of requests, not as they come")] = False,
) -> None:
    """Send a list of requests, behind those of people who wait. The key, if one is needed: CARAVAN_API_KEY."""
    import asyncio
    import os

    from rich.console import Console
    from rich.progress import Progress

    from ops.batch import BatchError, Options, Summary, read_requests, run

    try:
        asked = read_requests(requests)
    except (BatchError, OSError) as error:
        fail(str(error))
    options = Options(url, os.environ.get("CARAVAN_API_KEY"), at_once, tries, in_order)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("requests", total=len(asked))

        def show(so_far: Summary) -> None:
            failed = so_far.failures.total()
            bar.update(task, completed=so_far.earlier + so_far.answered + failed, description=f"{failed} failed")

        summary = asyncio.run(run(asked, results, options, show))
    typer.echo(
        f"{summary.answered} answered, {summary.earlier} earlier, {summary.retries} sent again; "
        f"{summary.prompt_tokens} prompt tokens, {summary.completion_tokens} generated"
    )
    for kind, count in summary.failures.most_common():
        typer.echo(f"{count} failed: {kind}", err=True)
    if summary.failures:
        raise typer.Exit(1)


@app.command(
    epilog="Example: caravan top --metrics http://10.0.0.1:8080/metrics --metrics http://10.0.0.2:8080/metrics"
)
def top(
    metrics: Annotated[list[str] | None, typer.Option(help="metrics endpoint of a Ray node; repeat for more")] = None,
    interval: Annotated[float, typer.Option(help="seconds between looks")] = 2.0,
    once: Annotated[bool, typer.Option(help="print one view and leave")] = False,
) -> None:
    """Live view of every replica and stage: tokens/s, queues, KV room, busy and waiting share of each stage."""
    from ops.watch.top import run

    try:
        raise typer.Exit(run(metrics or [DEFAULT_METRICS], interval, once))
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@app.command(epilog="Example: caravan dashboard --output caravan.json, then import the file in Grafana")
def dashboard(
    output: Annotated[Path | None, typer.Option(help="file to write; default: standard output")] = None,
    pipeline: Annotated[bool, typer.Option("--pipeline", help="the board of one pipeline, not of the service")] = False,
    runbook_url: Annotated[
        str, typer.Option(envvar="CARAVAN_RUNBOOK_URL", help="where ops/runbook.md is to be read, for links")
    ] = "ops/runbook.md",
) -> None:
    """Print a Grafana dashboard as JSON: the service's, or a pipeline's. Its first row needs the rules of `alerts`."""
    from ops.watch.dashboard import dashboard_json

    write(dashboard_json("pipeline" if pipeline else "service", runbook_url), output)


@app.command(epilog="Example: caravan alerts --output caravan-alerts.yml, then name the file under rule_files")
def alerts(
    output: Annotated[Path | None, typer.Option(help="file to write; default: standard output")] = None,
    runbook_url: Annotated[
        str, typer.Option(envvar="CARAVAN_RUNBOOK_URL", help="where ops/runbook.md is to be read, for runbook_url")
    ] = "ops/runbook.md",
    first_token_s: Annotated[float, typer.Option(help="objective of the first token: an edge of ttft_seconds")] = 2.5,
    inter_token_s: Annotated[
        float, typer.Option(help="objective between tokens: an edge of inter_token_seconds")
    ] = 0.1,
    scale_to_zero: Annotated[bool, typer.Option("--scale-to-zero", help="having no engine at all is no alarm")] = False,
) -> None:
    """Print Prometheus' recording and alerting rules; ops/runbook.md says what to do about each."""
    from deployments.metrics import TOKEN_BUCKETS, TTFT_BUCKETS
    from ops.watch.alerts import rules_json
    from ops.watch.objectives import objectives

    for option, value, edges in (
        ("first-token-s", first_token_s, TTFT_BUCKETS), ("inter-token-s", inter_token_s, TOKEN_BUCKETS),
    ):  # fmt: skip
        if value not in edges:
            fail(f"--{option} {value:g}: must be one of {', '.join(f'{edge:g}' for edge in edges)}")
    table = objectives(first_token_s, inter_token_s)
    write(rules_json(table=table, runbook_url=runbook_url, scale_to_zero=scale_to_zero), output)


@app.command(epilog="Example: caravan schema --output schema.json; editors check YAML files that name it")
def schema(
    output: Annotated[Path | None, typer.Option(help="file to write; default: standard output")] = None,
) -> None:
    """Print the JSON schema of a whole configuration file, ours and Serve's part."""
    from deployments.schema import schema_json

    write(schema_json(), output)


@app.command(epilog="Example: caravan configs ray_config.yaml --output my_config.yaml")
def configs(
    name: Annotated[str, typer.Argument(help="one of them; default: list their names")] = "",
    output: Annotated[Path | None, typer.Option(help="file to write; default: standard output")] = None,
) -> None:
    """The configuration files that come with Caravan: to begin with, and to measure a machine with."""
    import deployments

    files = {file.name: file for file in (Path(deployments.__file__).parent / "configs").glob("*.yaml")}
    if name and name not in files:
        fail(f"{name}: there is no such configuration; there are {', '.join(sorted(files))}")
    write(files[name].read_text("utf-8") if name else "".join(f"{found}\n" for found in sorted(files)), output)


def write(text: str, output: Path | None) -> None:
    """To a file, or to standard output."""
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, "utf-8")


@app.command(epilog="Example: caravan inspect /models/llama-2-7b --stages 2")
def inspect(
    path: Annotated[str, typer.Argument(help="checkpoint file or directory, pkg:module/file, or shape:llama-2-70b")],
    stages: Annotated[int, typer.Option(help="also show a split into this many stages")] = 2,
    dtype: Annotated[
        str, typer.Option(help="type of the weights when served: bfloat16, float16 or float32")
    ] = "bfloat16",
    prompt_format: Annotated[str, typer.Option(help="as in model.prompt_format")] = "auto",
    fp8: Annotated[bool, typer.Option("--fp8", help="sizes with model.quantization: fp8")] = False,
    quantization_ignore: Annotated[str, typer.Option(help="with --fp8: what it leaves out, e.g. w2,layers.0.*")] = "",
) -> None:
    """What a checkpoint is: family, shape, types, context, prompt format with an example, and its split into stages."""
    from rich.console import Console

    from model.weights import resolve_path
    from model.weights.sharded import ITEM_SIZES
    from ops.inspection import inspect as inspected

    ignored = quantization_ignore.split(",") if quantization_ignore else []
    if dtype not in ITEM_SIZES:
        fail(f"--dtype {dtype}: must be one of {', '.join(ITEM_SIZES)}")
    if ignored and not fp8:
        fail(f"--quantization-ignore {quantization_ignore}: says what --fp8 leaves out: give that too")
    try:
        found = inspected(resolve_path(path), stages, dtype, prompt_format, fp8, ignored)
        Console(soft_wrap=True).print(found)
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
        f"{out}: give it as model.path, with pipeline.stages: {stages} and "
        f"split: [{','.join(str(part.stop - part.start) for part in parts)}]"
    )


keys = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(keys, name="keys")


@keys.callback()
def keys_() -> None:
    """API keys."""


@keys.command(epilog="Example: caravan keys add search-team --file keys.yaml --tokens-per-minute 200000")
def add(
    name: Annotated[str, typer.Argument(help="the tenant: a new one, or one that gets a further key")],
    file: Annotated[Path, typer.Option(help="where to put its digest: auth.keys_file")] = Path("keys.yaml"),
    weight: Annotated[float | None, typer.Option(help="share of a busy engine, compared with other tenants'")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="more get 429")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="prompt and output; beyond it, 429")] = None,
    priority: Annotated[int | None, typer.Option(help="the most urgent priority it may ask for; default 0")] = None,
    operator: Annotated[
        bool | None, typer.Option("--operator", help="it may reset the engines' caches, load and unload adapters")
    ] = None,
    cache_salt: Annotated[str | None, typer.Option(help="cached prompts are shared only with the same salt")] = None,
) -> None:
    """Make an API key. It is shown once and kept nowhere; the file gets its sha256."""
    from deployments.config import ConfigError
    from deployments.gateway.tenants import add_key

    try:
        key = add_key(
            file, name, weight=weight, priority=priority, requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute, cache_salt=cache_salt, operator=operator,
        )  # fmt: skip
    except (ConfigError, OSError) as error:
        fail(str(error))
    typer.echo(key)
    typer.echo(f"{name}: its sha256 is in {file}; gateways that read it know the key within a second", err=True)


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
    end_on_signals()
    app()


if __name__ == "__main__":
    main()
