"""`caravan bench adapters`."""

from pathlib import Path
from typing import Annotated

import typer

from ops.bench.options import Output, read_app_config, report


def adapters(
    config: Annotated[Path, typer.Argument(help="the Serve configuration whose model to take")],
    streams: Annotated[int, typer.Option(min=2, help="at once")] = 64,
    rank: Annotated[int, typer.Option(min=1, max=256)] = 16,
    count: Annotated[int, typer.Option(min=1, help="adapters at once")] = 8,
    output_tokens: Annotated[int, typer.Option(min=2, help="of each stream")] = 128,
    turns: Annotated[int, typer.Option(min=1, help="of each kind, one after another")] = 3,
    output: Output = None,
) -> None:
    """LoRA adapters: a step of one stage with none, one and several, and what swapping one in costs others."""
    from ops.bench.adapters.run import adapters_table, bench_adapters

    result = bench_adapters(read_app_config(config), streams, rank, count, output_tokens, turns)
    report(adapters_table(result), result, output)
