"""The command line, and what people see of a report."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ops.bench.options import Output, fail

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ops.preflight.run import Report, Wanted


def preflight(
    file: Annotated[Path, typer.Argument(help="the Serve configuration file that is to be deployed")],
    address: Annotated[str, typer.Option(help="of the Ray cluster; auto: the one of this node")] = "auto",
    checksums: Annotated[bool, typer.Option("--checksums", help="read all weights on every node, not samples")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
    output: Output = None,
) -> None:
    """Whether the nodes of a Ray cluster are what a configuration needs: addresses, GPUs, memory, versions, links,
    weights, clocks, ports, limits, and a place for every stage. Exit status 1 if anything is wrong."""
    from rich.console import Console

    from ops.preflight.run import PreflightError
    from ops.preflight.run import preflight as asked

    try:
        report = asked(read_wanted(file, checksums), address)
    except (PreflightError, ValueError) as error:
        fail(str(error))
    text = json.dumps(as_dict(report), indent=1)
    if output is not None:
        output.write_text(text + "\n", "utf-8")
    if as_json:
        typer.echo(text)
    else:
        console = Console(width=None if Console().is_terminal else 160)
        for part in shown(report):
            console.print(part)
    if report.findings:
        raise typer.Exit(1)


def read_wanted(file: Path, checksums: bool) -> "Wanted":
    """From a Serve configuration. Raises `ValueError` with everything that `caravan check` finds, files aside."""
    import yaml

    from deployments.config import parse_app_config
    from deployments.placement import bundles
    from ops.preflight.run import Wanted

    try:
        content: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
        application = content["applications"][0]
        config = parse_app_config(application.get("args") or {})
    except (OSError, LookupError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {error}") from error
    changed: dict[str, Any] = next((d for d in application.get("deployments") or [] if d.get("name") == "Engine"), {})
    return Wanted(
        config=config,
        every_node_serves=content.get("proxy_location", "EveryNode") == "EveryNode",
        http_port=int((content.get("http_options") or {}).get("port", 8000)),
        bundles=changed.get("placement_group_bundles") or bundles(config),
        strategy=changed.get("placement_group_strategy") or config.resources.placement,
        checksums=checksums,
    )


def as_dict(report: "Report") -> dict[str, Any]:
    return {
        "nodes": {node: dataclasses.asdict(facts) for node, facts in report.facts.items()},
        "clocks": {node: {"ahead_s": ahead, "doubt_s": doubt} for node, (ahead, doubt) in report.clocks.items()},
        "links": [
            {"between": list(pair), **({"problem": f} if isinstance(f, str) else dataclasses.asdict(f))}
            for pair, f in report.links.items()
        ],
        "findings": [dataclasses.asdict(found) for found in report.findings],
    }


def shown(report: "Report") -> "list[RenderableType]":
    """Tables: nodes, links, and what is wrong."""
    from rich.table import Table

    nodes = Table("node", "interface", "GPUs", "memory", "/dev/shm", "files", "clock", "weights", title="nodes")
    for node, own in report.facts.items():
        gpus = ", ".join(f"{g.name} ({(g.total_mb - g.used_mb) / 1024:.0f} GiB free)" for g in own.gpus) or "none"
        bad = bool(own.weights.problem or own.weights.missing)
        ahead = report.clocks[node][0]
        nodes.add_row(
            node, f"{own.interface} {own.address}", gpus, f"{own.memory_bytes / 1e9:.1f} GB",
            f"{own.shm_bytes / 1e9:.1f} GB", str(own.open_files), f"{ahead:+.3f} s",
            "wrong" if bad else f"{len(own.weights.digests)} files" if own.weights.digests else "made up",
        )  # fmt: skip
    links = Table("between", "by", "round trip", "rate", title="links")
    for pair, figures in report.links.items():
        if isinstance(figures, str):
            links.add_row(" - ".join(pair), "none", "", "")
        else:
            rate = f"{8 * figures.bytes_per_s / 1e9:.2f} Gbit/s"
            links.add_row(" - ".join(pair), figures.kind, f"{1e3 * figures.round_trip_s:.2f} ms", rate)
    if not report.findings:
        return [nodes, links, f"{len(report.facts)} nodes: all good"]
    wrong = Table("check", "where", "what is wrong", "what to do", title=f"{len(report.findings)} findings")
    for found in report.findings:
        wrong.add_row(found.check, found.node, found.problem, found.remedy)
    return [nodes, links, wrong]
