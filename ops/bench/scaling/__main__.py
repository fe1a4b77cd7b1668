"""The scaling run: `python -m ops.bench.scaling cuda` (or one-gpu, cpu) measures the table, into ops/results.

Run it again to go on after an interruption. `python -m ops.bench.scaling cuda fp8x1,fp8x2` measures those rows only,
for a place where no command may take long.
"""

import os
import sys
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

RESULTS = Path(__file__).parents[2] / "results"


def main(device: str, rows: str = "") -> NoReturn:
    """Become `caravan bench scaling`: whoever ends this process ends that, and what it has started."""
    file = RESULTS / f"scaling-{device}-{date.today().isoformat()}.json"
    file = max(RESULTS.glob(f"scaling-{device}-*.json"), default=file)
    command = [sys.executable, "-m", "ops.cli", "bench", "scaling", str(file), "--device", device]
    command += ["--plot", str(file.with_suffix(".png"))] if find_spec("matplotlib") else []  # or draw it elsewhere
    command += ["--rows", rows] if rows else []
    os.chdir(RESULTS.parents[1])
    os.execv(sys.executable, command)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m ops.bench.scaling cuda|one-gpu|cpu [rows]")
    main(*sys.argv[1:])
