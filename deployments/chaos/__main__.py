"""`python -m deployments.chaos` is `caravan chaos`."""

import typer

from deployments.chaos.command import chaos
from deployments.interrupt import end_on_signals

end_on_signals()
typer.run(chaos)
