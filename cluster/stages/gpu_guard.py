"""A stage that gets a whole GPU finds it empty, or says who holds it."""

import subprocess
import time
from dataclasses import dataclass

import torch

OWN_BYTES = 2_000_000_000  # a CUDA context with its libraries, and what the driver keeps for itself
FREED_S = 20.0  # how long the memory of a process that was killed may take to come back
POLL_S = 0.5
QUERY = ("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory,process_name", "--format=csv,noheader,nounits")


@dataclass(frozen=True, slots=True)
class Holder:
    """A process with memory on a GPU."""

    gpu_uuid: str
    pid: int
    megabytes: int
    name: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.name}, {self.megabytes:,} MB)"


def check_free(device: torch.device) -> None:
    """Raises `ValueError` naming the processes that hold `device`, once they had time to go."""
    deadline = time.monotonic() + FREED_S
    while (used := _used(device)) > OWN_BYTES:
        if time.monotonic() > deadline:
            properties = torch.cuda.get_device_properties(device)
            raise ValueError(refusal(properties.name, f"GPU-{properties.uuid}", used, holders()))
        time.sleep(POLL_S)


def _used(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def holders() -> list[Holder]:
    """All processes with memory on a GPU that this one may see; none where there is no nvidia-smi."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse(done.stdout)


def parse(listing: str) -> list[Holder]:
    """nvidia-smi's lines `uuid, pid, MiB, name`; what it does not know is `[N/A]`."""
    found = []
    for line in listing.splitlines():
        parts = [part.strip() for part in line.split(",", 3)]
        if len(parts) == 4 and parts[1].isdigit():
            found.append(Holder(parts[0], int(parts[1]), int(parts[2]) if parts[2].isdigit() else 0, parts[3]))
    return found


def refusal(gpu: str, uuid: str, used: int, all_holders: list[Holder]) -> str:
    """The sentence for whoever is to make room."""
    names = ", ".join(str(holder) for holder in all_holders if holder.gpu_uuid == uuid)
    return (
        f"{gpu} is not free: {used / 1e9:.1f} GB of its memory are held by "
        f"{names or 'a process that is not visible from here'}. End it, or keep Ray off this GPU"
    )
