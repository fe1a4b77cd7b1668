"""`python -m deployments.chaos` is `caravan chaos`."""

import typer

from deployments.chaos.command import chaos

typer.run(chaos)
