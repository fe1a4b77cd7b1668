"""`caravan bench copies`: the second tier of the cache."""

from pathlib import Path
from typing import Annotated

import typer

from ops.bench.options import Output, fail, read_app_config, report


def copies(
    config: Annotated[Path, typer.Argument(help="the Serve configuration of the engine, with cache.host_gb")],
    tokens: Annotated[int, typer.Option(help="of a conversation that comes back")] = 3500,
    others: Annotated[int, typer.Option(help="sequences that decode meanwhile")] = 16,
    returning: Annotated[int, typer.Option(help="conversations that come back at once")] = 8,
    output: Output = None,
) -> None:
    """The engine alone in a Ray of its own, with the host tier and without: what comes back, what others pay."""
    from ops.bench.engine.copies import bench_copies, copies_table
    from ops.bench.engine.run import own_ray

    app_config = read_app_config(config)
    if not app_config.cache.host_gb:
        fail(f"{config}: cache.host_gb is 0: there is nothing to compare")
    try:
        with own_ray(app_config):
            result = bench_copies(app_config, tokens, others, returning)
    except ValueError as error:
        fail(f"{config}: {error}")
    report(copies_table(f"{app_config.model.name}: {config}", result), result, output)
