"""The living processes of this machine, as the kernel lists them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LivingProcess:
    """One of them, as of a moment ago."""

    pid: int
    name: str  # at most 15 characters
    parent: int
    session: int


def living_processes() -> Iterator[LivingProcess]:
    """All of them; those that have ended and wait for their parent to notice are none."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue  # it ended just now
        state, parent, _group, session = rest.split()[:4]
        if state != "Z":
            yield LivingProcess(int(entry.name), name, int(parent), int(session))
