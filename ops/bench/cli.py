"""`caravan bench`: measure. Starts fast, as all of the command line does: each command imports what it needs."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ops.bench.adapters_command import adapters
from ops.bench.options import (
    DEFAULT_URL,
    Longest,
    Output,
    Plot,
    Processes,
    Requests,
    check_plot,
    fail,
    numbers,
    read_app_config,
    report,
    shape_of,
    sizes,
)

HELP = "Measure: the engine alone, a service over HTTP, how pipelines scale, reading a checkpoint, perplexity."
bench = typer.Typer(help=HELP, no_args_is_help=True)
bench.command(name="adapters", epilog="Example: caravan bench adapters ray_config.yaml --streams 8")(adapters)


@bench.callback()
def bench_() -> None:
    """Measure."""


@bench.command(
    epilog="Example: caravan bench offline deployments/configs/llama2-70b-dummy.yaml --batch-sizes 1,64"
    " --steady 256x450"
)
def offline(
    config: Annotated[Path, typer.Argument(help="the Serve configuration whose engine to measure")],
    requests: Annotated[int, typer.Option(help="how many requests of the fixed list; 0: none")] = 1200,
    which: Annotated[
        Literal["mixed", "long", "shared"],
        typer.Option("--list", help="mixed; long: 3,000 tokens in, 1,000 out; shared: four beginnings of 1,500 tokens"),
    ] = "mixed",
    concurrency: Annotated[int, typer.Option(help="how many of them are open at a time; 0: all at once")] = 0,
    batch_sizes: Annotated[str, typer.Option(help="also ms per token of these batches, e.g. 1,64")] = "",
    steady: Annotated[str, typer.Option(help="also steady decode of sequences x tokens of context, e.g. 256x450")] = "",
    max_tokens: Longest = 0,
    policy: Annotated[str, typer.Option(help="instead of the file's scheduler.policy, e.g. longest_first")] = "",
    output: Output = None,
) -> None:
    """The engine alone in a Ray of its own: a fixed list of requests at once, single batches, steady decode.

    Beside each figure its floor: what the devices, measured just before, need at least.
    """
    from ops.bench import workload
    from ops.bench.engine.offline import bench_offline, offline_table

    app_config, batches = read_app_config(config, policy), sizes(batch_sizes, "--batch-sizes")
    shape = shape_of(steady, "--steady")
    try:
        longest = max_tokens or workload.LONGEST
        result = bench_offline(app_config, requests, batches, shape, longest, concurrency, which)
    except ValueError as error:
        fail(str(error))
    report(offline_table(f"{app_config.model.name}: {config}", result), result, output)


@bench.command(epilog="Example: caravan bench kernels --model shape:llama-2-70b --attention 32x1024,128x1024")
def kernels(
    model: Annotated[str, typer.Option(help="whose shape; weights are made up")] = "shape:llama-2-70b",
    layers: Annotated[int, typer.Option(help="how many of its layers prefill goes through")] = 10,
    chunk: Annotated[int, typer.Option(help="tokens of the prompt that is prefilled")] = 4096,
    attention: Annotated[
        str, typer.Option(help="decode attention of these, sequences x tokens of context")
    ] = "32x1024,128x1024",
    output: Output = None,
) -> None:
    """One GPU: decode attention as a share of what it can read, prefill as a share of what it can multiply."""
    import torch

    from ops.bench.engine.kernels import bench_kernels, kernels_table

    if not torch.cuda.is_available():
        fail("caravan bench kernels needs a CUDA device, and this machine has none")
    shapes = [shape for part in attention.split(",") if (shape := shape_of(part, "--attention"))]
    try:
        result = bench_kernels(model, layers, chunk, shapes)
    except ValueError as error:
        fail(str(error))
    report(kernels_table(result), result, output)


@bench.command(epilog="Example: caravan bench sums --rows 1,64,512")
def sums(
    rows: Annotated[str, typer.Option(help="how many rows are added up")] = "1,16,64,128,512,2048",
    width: Annotated[int, typer.Option(help="values of a row: the model's width")] = 8192,
    output: Output = None,
) -> None:
    """Two GPUs: what it takes to add up what they have computed, as tensor parallelism does twice a layer."""
    import torch

    from ops.bench.engine.sums import bench_sums, sums_table

    if torch.cuda.device_count() < 2:
        fail("caravan bench sums needs two CUDA devices")
    result = {"device": torch.cuda.get_device_name(), "width": width, "sums": bench_sums(width, sizes(rows, "--rows"))}
    report(sums_table(result), result, output)


@bench.command(epilog="Example: caravan bench serve --concurrency 256 --requests 600 --processes 4")
def serve(
    url: Annotated[str, typer.Option(help="where the service is")] = DEFAULT_URL,
    requests: Requests = 100,
    concurrency: Annotated[int, typer.Option(min=1, help="streams at once (closed loop)")] = 8,
    rate: Annotated[float, typer.Option(help="instead: requests a second, arriving by themselves (open loop)")] = 0.0,
    processes: Processes = 1,
    vocab_size: Annotated[int, typer.Option(help="prompts are random ids below this")] = 32_000,
    max_tokens: Longest = 0,
    output: Output = None,
) -> None:
    """A running service over HTTP, streamed, on a fixed list of lengths: TTFT, inter-token and end-to-end latency."""
    from ops.bench.service.sweep import Load, as_json, measure

    model, todo = _requests(url, requests, vocab_size, max_tokens)
    how = Load(rate=rate) if rate else Load(concurrency)
    summary = measure(url, todo, how, processes)
    result = as_json(how, summary, processes)
    report(summary.table(f"{model} at {url}, {how.label}{'' if rate else ' streams'}"), result, output)
    if summary.failed:
        fail(f"{summary.failed} of {summary.requests} requests failed")


def _requests(url: str, count: int, vocab_size: int, max_tokens: int) -> tuple[str, list[dict[str, Any]]]:
    """The model that is served at `url`, and the requests of the list to it."""
    from ops.bench import workload
    from ops.bench.service.sweep import bodies
    from ops.chat_client import ChatFailed, served_model

    try:
        model = served_model(url)
    except ChatFailed as error:
        fail(str(error))
    return model, bodies(model, count, vocab_size, max_tokens or workload.LONGEST)


@bench.command(
    epilog="Example: caravan bench sweep --concurrency 1,8,64,256 --rates 2,4 --requests 600 --plot sweep.png\n\n"
    "Or the engine alone: caravan bench sweep --offline ray_config.yaml --batch-sizes 1,4,16,64 --plot sweep.png"
)
def sweep(
    url: Annotated[str, typer.Option(help="where the service is")] = DEFAULT_URL,
    concurrency: Annotated[str, typer.Option(help="streams at once (closed loop), e.g. 1,8,64")] = "",
    rates: Annotated[str, typer.Option(help="requests a second, arriving by themselves (open loop), e.g. 1,2,4")] = "",
    requests: Requests = 100,
    processes: Processes = 1,
    vocab_size: Annotated[int, typer.Option(help="prompts are random ids below this")] = 32_000,
    max_tokens: Longest = 0,
    offline: Annotated[Path | None, typer.Option(help="instead of a service the engine of this configuration")] = None,
    batch_sizes: Annotated[str, typer.Option(help="with --offline: batches of equal streams, e.g. 1,8,64")] = "",
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Throughput against latency under a list of loads, one after another: a table, a line of JSON, a plot."""
    check_plot(plot)
    if offline is not None:
        if not batch_sizes or concurrency or rates:
            fail("--offline takes --batch-sizes, and neither --concurrency nor --rates: no HTTP is in front")
        return _sweep_engine(offline, sizes(batch_sizes, "--batch-sizes"), max_tokens, output, plot)
    if batch_sizes or not (concurrency or rates):
        fail("give --concurrency or --rates or both; or --offline FILE with --batch-sizes")
    _sweep_service(url, concurrency, rates, (requests, vocab_size, max_tokens), processes, output, plot)


def _sweep_service(
    url: str, concurrency: str, rates: str, what: tuple[int, int, int], processes: int, output: Output, plot: Plot
) -> None:
    from ops.bench.plot import throughput_latency
    from ops.bench.service.sweep import Load, as_json, measure, sweep_points, sweep_table

    loads = [Load(n) for n in sizes(concurrency, "--concurrency")]
    loads += [Load(rate=r) for r in numbers(rates, "--rates")]
    model, todo = _requests(url, *what)
    results = []
    for how in loads:
        typer.echo(f"{how.label} ...", err=True)
        results.append((how, measure(url, todo, how, processes)))
    points = {"points": [as_json(*r, processes) for r in results]}
    report(sweep_table(f"{model} at {url}", results), points, output)
    if plot is not None:
        throughput_latency(sweep_points(results), f"{model} over HTTP", "time per output token", plot)
    if any(summary.failed for _, summary in results):
        fail("some requests failed")


def _sweep_engine(config: Path, batches: list[int], max_tokens: int, output: Path | None, plot: Path | None) -> None:
    from ops.bench import workload
    from ops.bench.engine.offline import bench_offline, offline_table
    from ops.bench.plot import throughput_latency
    from ops.bench.service.sweep import batch_points

    app_config = read_app_config(config)
    try:
        result = bench_offline(app_config, 0, batches, None, max_tokens or workload.LONGEST)
    except ValueError as error:
        fail(str(error))
    report(offline_table(f"{app_config.model.name}: {config}", result), result, output)
    if plot is not None:
        title = f"{app_config.model.name}, the engine alone, {app_config.pipeline.stages} stages"
        throughput_latency(batch_points(result["batches"]), title, "time per output token", plot)


@bench.command(epilog="Example: caravan bench overload --seconds 60 --factor 10")
def overload(
    config: Annotated[Path, typer.Option(help="the configuration to deploy here, with one stage")] = Path(
        "ray_config.yaml"
    ),
    target: Annotated[float, typer.Option(help="admission.target_ttft_s; longer on a slow machine")] = 5.0,
    seconds: Annotated[float, typer.Option(help="how long")] = 60.0,
    factor: Annotated[float, typer.Option(help="how much more than it can take")] = 10.0,
    haproxy: Annotated[bool, typer.Option(help="HAProxy as Serve's ingress")] = True,
    output: Output = None,
) -> None:
    """A service on this machine with ten times what it can take: accepted and refused requests, gateway memory."""
    from ops.bench.service.overload import bench_overload, overload_table
    from ops.local import LocalError

    try:
        result = bench_overload(config, target, seconds, factor, haproxy)
    except LocalError as error:
        fail(str(error))
    report(overload_table(result), result, output)


@bench.command(epilog="Example: caravan bench load --gb 2 --stages 4")
def load(
    gb: Annotated[float, typer.Option(help="size of the checkpoint that is written for it")] = 2.0,
    stages: Annotated[int, typer.Option(help="stages that share it")] = 4,
    directory: Annotated[Path | None, typer.Option(help="where to write it; default: a temporary directory")] = None,
    output: Output = None,
) -> None:
    """Bytes read, peak memory and time of stages that read their shares, beside a plain safetensors read."""
    import tempfile

    from ops.bench.engine.loading import bench_load, load_table

    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        result = bench_load(gb, stages, Path(temporary))
    report(load_table(result), result, output)


@bench.command(epilog="Example: caravan bench scheduler --sequences 256,4096")
def scheduler(
    sequences: Annotated[str, typer.Option(help="how many decode")] = "1,256,4096",
    repeats: Annotated[int, typer.Option(help="measure so often; the least counts")] = 8,
    output: Output = None,
) -> None:
    """What a decode step costs the scheduler itself, in processor time, without stages."""
    from ops.bench.engine.scheduling import bench_scheduler, scheduler_table

    results = bench_scheduler(sizes(sequences, "--sequences"), repeats)
    report(scheduler_table(results), {"steps": results}, output)


@bench.command(epilog="Example: caravan bench speculation ray_config.yaml --tokens 8")
def speculation(
    config: Annotated[Path, typer.Argument(help="the Serve configuration whose engine to measure")],
    batch_sizes: Annotated[str, typer.Option(help="of made-up weights: so many replayed streams")] = "1,8,64",
    right: Annotated[float, typer.Option(help="how many of their drafted tokens are right")] = 0.7,
    tokens: Annotated[int, typer.Option(help="drafted of each stream in a step; 0: as many as pay")] = 0,
    output: Output = None,
) -> None:
    """The same streams with drafted tokens and without: time per token, and whether they are the same."""
    from ops.bench.engine.speculation import bench_speculation, speculation_table

    result = bench_speculation(read_app_config(config), sizes(batch_sizes, "--batch-sizes"), right, tokens or None)
    report(speculation_table(f"speculation: {config}", result), result, output)


@bench.command(
    epilog="Example: caravan bench fairness --seconds 300\n\n"
    "Or over HTTP: caravan bench fairness --deploy ray_config.yaml --shares 0.2 --seconds 60"
)
def fairness(
    shares: Annotated[str, typer.Option(help="what the small tenant wants of the engine")] = "0.1,0.3,0.45,0.6",
    seconds: Annotated[float, typer.Option(help="for each share; of simulated ones the first 60 warm up")] = 300.0,
    deploy: Annotated[
        Path | None, typer.Option(help="instead: deploy this here, and ask over HTTP with two keys")
    ] = None,
    output: Output = None,
) -> None:
    """Two tenants before one engine, one with ten times the demand: the real scheduler against a simulated clock."""
    from ops.bench.engine.fairness import bench_fairness, fairness_table
    from ops.bench.service.fairness_http import bench_fairness_http, fairness_http_table
    from ops.local import LocalError

    wanted = numbers(shares, "--shares")
    if deploy is None:
        results = bench_fairness(wanted, seconds)
        return report(fairness_table(results), {"seconds": seconds, "shares": results}, output)
    try:
        result = bench_fairness_http(deploy, wanted, seconds)
    except LocalError as error:
        fail(str(error))
    report(fairness_http_table(result), {"config": str(deploy), **result}, output)


@bench.command(epilog="Example: caravan bench abuse ray_config.yaml --attacks long-texts,expressions,all --keys")
def abuse(
    config: Annotated[Path, typer.Argument(help="the Serve configuration to deploy here and to attack")],
    attacks: Annotated[str, typer.Option(help="which, in this order; default: each, then all together")] = "",
    seconds: Annotated[float, typer.Option(help="for each attack, and for each quiet spell between them")] = 15.0,
    keys: Annotated[bool, typer.Option("--keys", help="the attacker and the others have a key each")] = False,
    haproxy: Annotated[bool, typer.Option("--haproxy", help="HAProxy is Serve's ingress")] = False,
    output: Output = None,
) -> None:
    """What plain clients notice while one other client sends 8 MB texts, bad expressions, half requests, and so on."""
    from ops.bench.service.abuse import KINDS, abuse_table, bench_abuse
    from ops.local import LocalError

    wanted = attacks.split(",") if attacks else list(KINDS)
    if unknown := set(wanted) - set(KINDS):
        fail(f"--attacks: there is no {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    try:
        result = bench_abuse(config, wanted, seconds, keys, haproxy)
    except LocalError as error:
        fail(str(error))
    report(abuse_table(result), {"config": str(config), **result}, output, width=200)
    if not all(row["holds"] for row in result["attacks"]):
        fail("not everything that must hold has held")


@bench.command(epilog="Example: caravan bench soak ray_config.yaml --minutes 60 --plot soak.png")
def soak(
    config: Annotated[Path, typer.Argument(help="the Serve configuration to deploy here")],
    minutes: Annotated[float, typer.Option(min=0.5, help="for how long")] = 60.0,
    haproxy: Annotated[bool, typer.Option("--haproxy", help="HAProxy is Serve's ingress")] = False,
    seed: Annotated[int, typer.Option(help="of what clients do")] = 0,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Everything that clients do, for hours: do memory, descriptors, threads or KV blocks grow? By their slopes."""
    from ops.bench.plot import over_time
    from ops.bench.service.soak import bench_soak, soak_table
    from ops.local import LocalError

    check_plot(plot)
    try:
        result = bench_soak(config, 60 * minutes, haproxy, seed)
    except LocalError as error:
        fail(str(error))
    if plot is not None:
        over_time({n: (s["s"], s["v"]) for n, s in result["series"].items()}, f"{minutes:g} minutes of soak", plot)
    report(soak_table(result), {"config": str(config), **result}, output)
    if not result["passed"]:
        fail("something grows, or was answered as it should not have been")


@bench.command(epilog="Example: caravan bench recovery deployments/configs/llama2-70b-dummy.yaml --stage 1")
def recovery(
    config: Annotated[Path, typer.Argument(help="the Serve configuration whose engine to break")],
    stage: Annotated[int, typer.Option(help="which stage to kill, counted from 0")] = 1,
    streams: Annotated[int, typer.Option(help="streams at once")] = 64,
    new_tokens: Annotated[int, typer.Option(help="tokens of each stream")] = 256,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of each stream's prompt")] = 128,
    spare: Annotated[bool, typer.Option(help="with pipeline.spare, whatever the file says")] = False,
    output: Output = None,
) -> None:
    """The engine alone in a Ray of its own: kill -9 of a stage in the middle of many streams, and what it costs."""
    from ops.bench.engine.recovery import bench_recovery, recovery_table
    from ops.bench.engine.run import own_ray

    app_config = read_app_config(config)
    if not 0 <= stage < app_config.pipeline.stages:
        fail(f"--stage {stage}: {config} has stages 0 to {app_config.pipeline.stages - 1}")
    try:
        with own_ray(app_config):
            if spare:
                pipeline = app_config.pipeline.model_copy(update={"spare": True})
                app_config = app_config.model_copy(update={"pipeline": pipeline})
            result = bench_recovery(app_config, streams, new_tokens, stage, prompt_tokens)
    except ValueError as error:
        fail(f"{config}: {error}")
    report(recovery_table(f"{app_config.model.name}: {config}", result), result, output)
    if result["streams_finished"] < streams:
        fail("not all streams finished")


@bench.command(epilog="Example: caravan bench constraints ray_config.yaml --streams 32")
def constraints(
    config: Annotated[Path, typer.Argument(help="the Serve configuration whose engine to measure")],
    streams: Annotated[int, typer.Option(min=1, help="at once")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="of each stream")] = 96,
    rounds: Annotated[int, typer.Option(min=1, help="of all kinds in turns")] = 5,
    output: Output = None,
) -> None:
    """Time between tokens under a JSON schema and a regular expression, beside free text, on the engine alone."""
    from ops.bench.engine.constraints import bench_constraints, constraints_table

    app_config = read_app_config(config)
    try:
        result = bench_constraints(app_config, streams, tokens, rounds)
    except ValueError as error:
        fail(str(error))
    report(constraints_table(result), {"config": str(config), **result}, output)


@bench.command(epilog="Example: caravan bench scaling scaling.json --plot scaling.png")
def scaling(
    file: Annotated[Path, typer.Argument(help="the result; rows that it holds already are not measured again")],
    device: Annotated[
        str, typer.Option(help="cuda: Llama 2 70B; cpu: a small model; one-gpu: it shares one; default: cuda or cpu")
    ] = "",
    rows: Annotated[
        str, typer.Option(help="only these, e.g. fp8x1,fp8x2,http-1x2 (one pipeline of two stages); default: all")
    ] = "",
    row_timeout: Annotated[float, typer.Option(help="seconds that one row may take")] = 1200.0,
    plot: Plot = None,
) -> None:
    """How pipelines scale: made-up weights on more and more stages, then two pipelines behind one endpoint.

    Each row is measured in processes of its own; what the machine has too few GPUs for is skipped, and it says so.
    """
    import torch

    from ops.bench.scaling.plan import PLANS, is_row, row_names
    from ops.bench.scaling.rows import bench_scaling, draw, scaling_table, throughputs

    check_plot(plot)
    gpus = torch.cuda.device_count()
    kind = device or ("cuda" if gpus else "cpu")
    plan = PLANS.get(kind)
    if plan is None:
        fail(f"--device {device}: must be one of {', '.join(PLANS)}")
    wanted = rows.split(",") if rows else row_names(plan)
    if unknown := [name for name in wanted if not is_row(plan, name)]:
        known = ", ".join(row_names(plan))
        fail(f"--rows: there is no {', '.join(unknown)}; there are {known}, and http-2x2 and the like")
    try:
        result = bench_scaling(plan, gpus, wanted, file, row_timeout)
    except ValueError as error:
        fail(str(error))
    report(scaling_table(result), result, None, width=180)  # Markdown must not be folded
    if plot is not None and throughputs(result):
        draw(result, plot)


@bench.command(epilog="Example: caravan bench rules ray_config.yaml --streams 32 --output-tokens 48")
def rules(
    config: Annotated[Path, typer.Argument(help="the Serve configuration whose model to take")],
    streams: Annotated[int, typer.Option(min=1, help="at once, on the engine")] = 32,
    output_tokens: Annotated[int, typer.Option(min=1, help="of each stream")] = 48,
    turns: Annotated[int, typer.Option(min=1, help="of each kind, one after another")] = 3,
    arrivals: Annotated[int, typer.Option(min=1, help="how many ways of arriving are simulated")] = 8,
    output: Output = None,
) -> None:
    """Penalties, logit_bias, logprobs and sampling on every stream, beside greedy streams of the same run."""
    from ops.bench.engine.rules import bench_rules, rules_table

    result = bench_rules(read_app_config(config), streams, output_tokens, turns, arrivals)
    report(rules_table(result), result, output)


@bench.command(epilog="Example: caravan bench perplexity ray_config.yaml --tokens 20000 --quantizations none,fp8")
def perplexity(
    config: Annotated[Path, typer.Argument(help="the Serve configuration whose model to look at")],
    text: Annotated[Path | None, typer.Option(help="a text; default: the reference that every Python holds")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="how many tokens of it")] = 20_000,
    skip: Annotated[int, typer.Option(min=0, help="tokens of it to leave out first")] = 0,
    window: Annotated[int, typer.Option(min=2, help="tokens of context at most")] = 1024,
    quantizations: Annotated[
        str,
        typer.Option(
            help="as in model.quantization, or fp8-cache: cache.dtype fp8; fp8-weights: they alone; fp8-w2 (-wqkv, "
            "-wo, -w13): these alone; ratios are to the first"
        ),
    ] = "none,fp8",
    quantization_ignore: Annotated[
        str | None, typer.Option(help="in place of the file's model.quantization_ignore, e.g. wqkv,layers.29.w2")
    ] = None,
    output: Output = None,
) -> None:
    """Perplexity of a text in full precision and in 8 bits, on one device; a CPU does the 8 bits slowly in torch."""
    from ops.bench.engine.perplexity import QUANTIZATIONS, bench_perplexity, default_text, perplexity_table

    wanted = quantizations.split(",")
    if set(wanted) - set(QUANTIZATIONS):
        fail(f"--quantizations {quantizations}: give some of {', '.join(QUANTIZATIONS)}")
    try:
        words = text.read_text("utf-8") if text else default_text()
        app_config = read_app_config(config)
        if quantization_ignore is not None:
            ignore = {"quantization_ignore": quantization_ignore.split(",") if quantization_ignore else []}
            app_config = app_config.model_copy(update={"model": app_config.model.model_copy(update=ignore)})
        result = bench_perplexity(app_config, words, tokens, window, wanted, skip)
    except (ValueError, OSError) as error:
        fail(str(error))
    report(perplexity_table(result), result, output)
