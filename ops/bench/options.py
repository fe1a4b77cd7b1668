"""What the commands of `caravan bench` share: options, how their values are read, and how a result is reported."""

import json
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from deployments.config import AppConfig

DEFAULT_URL = "http://127.0.0.1:8000"
Output = Annotated[Path | None, typer.Option(help="write the result as JSON here")]
Plot = Annotated[Path | None, typer.Option(help="draw it as a PNG here (needs matplotlib)")]
Requests = Annotated[int, typer.Option(help="how many requests of the fixed list")]
Longest = Annotated[int, typer.Option(help="cut prompts and outputs of the list to this length; 0: leave them")]
Processes = Annotated[int, typer.Option(help="client processes; one drives about 2,000 tokens a second")]


def fail(message: str) -> NoReturn:
    """One plain sentence and exit status 1."""
    typer.echo(message, err=True)
    raise typer.Exit(1)


def numbers(text: str, option: str) -> list[float]:
    """`1,2,4` as numbers."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
        if any(n <= 0 for n in found):
            raise ValueError
    except ValueError:
        fail(f"{option} {text}: give positive numbers, like 1,8,64")
    return found


def sizes(text: str, option: str) -> list[int]:
    return [int(n) for n in numbers(text, option)]


def read_app_config(path: Path, policy: str = "") -> "AppConfig":
    """The application of a Serve file, with another `scheduler.policy` if one is given."""
    import yaml

    from deployments.config import parse_app_config

    try:
        args = yaml.safe_load(path.read_text("utf-8"))["applications"][0]["args"]
        if policy:
            args["scheduler"] = {**args.get("scheduler", {}), "policy": policy}
        return parse_app_config(args)
    except (OSError, ValueError, LookupError, TypeError) as error:
        fail(f"{path}: {error}")


def shape_of(text: str, option: str) -> tuple[int, int] | None:
    if not text:
        return None
    num_seqs, x, context = text.partition("x")
    if not (x and num_seqs.isdecimal() and context.isdecimal() and int(num_seqs) and int(context)):
        fail(f"{option} {text}: give sequences x tokens of context, like 256x450")
    return int(num_seqs), int(context)


def check_plot(path: Path | None) -> None:
    """Before anything is measured."""
    from ops.bench.plot import PlotError, check_matplotlib

    if path is not None:
        try:
            check_matplotlib()
        except PlotError as error:
            fail(f"--plot: {error}")


def report(table: "Table", result: dict[str, Any], output: Path | None, width: int | None = None) -> None:
    """A table for people, one line of JSON for scripts, and the file, which alone holds the trace of single steps."""
    from rich.console import Console

    result = {"date": date.today().isoformat(), "command": "caravan " + shlex.join(sys.argv[1:]), **result}
    Console(width=width).print(table)
    print(json.dumps({k: _without_trace(v) for k, v in result.items()}))
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


def _without_trace(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "trace"} if isinstance(value, dict) else value
