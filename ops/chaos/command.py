"""The command line of a run under faults."""

import json
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ops.chaos import FAULTS, NEED_NAMESPACES

NO_RECOVERY = {"gateway": {"resume_attempts": 0}, "pipeline": {"recovery_attempts": 0}}


def chaos(
    faults: Annotated[str, typer.Option(help="what to break, of: " + ", ".join(FAULTS))] = "stage,engine,node",
    requests: Annotated[int, typer.Option(help="run until so many requests have finished")] = 1000,
    streams: Annotated[int, typer.Option(help="requests open at once")] = 64,
    at_least: Annotated[int, typer.Option(help="make at least so many faults")] = 1,
    every: Annotated[float, typer.Option(help="seconds between faults; 0: as soon as the last one has healed")] = 0.0,
    hold: Annotated[float, typer.Option(help="seconds that a process stays stopped, a link cut, a disk full")] = 15.0,
    hosts: Annotated[
        str, typer.Option(help="processes, or namespaces: a network of its own for each node")
    ] = "processes",
    engines: Annotated[int, typer.Option(help="pipelines")] = 2,
    gateways: Annotated[int, typer.Option(help="gateways")] = 2,
    spare: Annotated[bool, typer.Option(help="keep a started process for every stage (pipeline.spare)")] = False,
    front: Annotated[str, typer.Option(help="where gateways and proxies run: head or workers")] = "head",
    haproxy: Annotated[bool, typer.Option(help="HAProxy instead of Serve's own proxy")] = False,
    recovery: Annotated[bool, typer.Option(help="whether the service may recover; the faults show without it")] = True,
    seed: Annotated[int, typer.Option(help="of the requests and the faults")] = 0,
    logs: Annotated[Path | None, typer.Option(help="keep all logs in this directory")] = None,
    out: Annotated[Path | None, typer.Option(help="write the JSON here too")] = None,
) -> None:
    """Break a service under load on this machine, and count what its clients see."""
    from rich.console import Console

    from ops.chaos.namespaces import NamespaceError
    from ops.chaos.run import Plan, run
    from ops.chaos.service import Setting
    from ops.chaos.table import table
    from ops.local import LocalError

    console = Console(width=None if Console().is_terminal else 160)
    kinds = [kind.strip() for kind in faults.split(",")]
    for problem in wrong_options(kinds, hosts, front):
        fail(problem)
    spread = bool(set(kinds) & NEED_NAMESPACES)
    setting = Setting(
        engines=engines,
        gateways=gateways,
        workers=(2 * engines if spread else engines) + (engines if "rollout" in kinds else 1),
        spread=spread,
        gateways_on_workers=front == "workers",
        namespaces=hosts == "namespaces",
        small_disks="disk-full" in kinds,
        haproxy=haproxy,
        scaled="scale" in kinds,
        spares=spare,
        args={} if recovery else NO_RECOVERY,
    )
    plan = Plan(
        kinds=kinds, streams=streams, requests=requests, faults=at_least, every_s=every or None, hold_s=hold, seed=seed
    )
    started = time.monotonic()
    with console.status("starting") as status:

        def say(text: str, passing: bool) -> None:
            line = f"{time.monotonic() - started:5.0f} s  {text}"
            if console.is_terminal:
                status.update(line)
            elif not passing:
                typer.echo(line)

        try:
            report = run(setting, plan, say, logs)
        except (LocalError, NamespaceError, ValueError) as error:
            fail(str(error))
        except KeyboardInterrupt:
            fail("interrupted; everything that was started has been ended")
    console.print(report.render())
    typer.echo(table({"this run": [json.loads(report.as_json())]}))
    typer.echo(report.as_json())
    if out is not None:
        out.write_text(report.as_json() + "\n")
    raise typer.Exit(0 if report.passed else 1)


def wrong_options(kinds: list[str], hosts: str, front: str) -> list[str]:
    """What cannot be, one line each."""
    problems = []
    if unknown := sorted(set(kinds) - set(FAULTS)):
        problems.append(f"--faults: there is no {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    if hosts not in ("processes", "namespaces"):
        problems.append(f"--hosts {hosts}: must be processes or namespaces")
    if front not in ("head", "workers"):
        problems.append(f"--front {front}: must be head or workers")
    if (needy := sorted(set(kinds) & NEED_NAMESPACES)) and hosts != "namespaces":
        problems.append(f"--faults {', '.join(needy)}: the network of single processes cannot fail; --hosts namespaces")
    return problems


def fail(message: str) -> NoReturn:
    """One plain sentence and exit status 2."""
    typer.echo(message, err=True)
    raise typer.Exit(2)
