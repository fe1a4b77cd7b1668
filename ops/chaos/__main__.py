"""`python -m ops.chaos` is `caravan chaos`."""

import typer

from ops.chaos.command import chaos
from ops.interrupt import end_on_signals

end_on_signals()
typer.run(chaos)
