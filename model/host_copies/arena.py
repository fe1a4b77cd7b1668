"""Host memory for copies of KV blocks that outlives the process that wrote them.

A file in shared memory: a page that says whose copies these are, a table with what is known of each place, the places.
A stage that is killed leaves it; whoever starts for the same work on that node finds it unlocked and goes on with it.
Nothing in it is trusted: a place counts only if its table entry names what is looked for and its sum is right.
"""

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

log = logging.getLogger(__name__)

SHARED = Path("/dev/shm")
PREFIX = "caravan-kv-"
PAGE = 4096
ENTRY = np.dtype([("hash", "S16"), ("sum", np.int64), ("unused", np.int64)])
HASH_BYTES = 16
KEPT_S = 600.0  # how long after its last use an arena waits for whoever it belongs to


class HostArena:
    """`num_places` places of `block_bytes` each."""

    def __init__(self, family: str, member: str, num_places: int, block_bytes: int, directory: Path = SHARED) -> None:
        """Take over what was left for this member, or begin anew. The names say all that the content depends on: the
        family what is the same for all stages of a pipeline.

        Raises `ValueError` if there is not as much shared memory.
        """
        self.num_places, self.block_bytes = num_places, block_bytes
        self._family = hashlib.sha256(f"{family}, {num_places} places".encode()).digest()
        self._key = self._family + hashlib.sha256(f"{member}, {block_bytes} bytes".encode()).digest()
        table = -(-num_places * ENTRY.itemsize // PAGE) * PAGE
        self._size = PAGE + table + num_places * block_bytes
        found = self._take_over(directory)
        self.is_new = found is None
        self._path, self._file = found or self._create(directory)
        self._map = mmap.mmap(self._file, self._size)
        self._table = np.frombuffer(self._map, ENTRY, num_places, PAGE)
        everything = torch.frombuffer(self._map, dtype=torch.uint8)
        self.places = everything[PAGE + table :].view(num_places, block_bytes)

    @property
    def num_kept(self) -> int:
        """Places that something is said of."""
        return int(np.count_nonzero(self._table["hash"]))

    def _take_over(self, directory: Path) -> tuple[Path, int] | None:
        """One that nobody holds. Others that nobody holds make room: those of another family, or left long ago."""
        taken, now = None, time.time()
        for path in sorted(directory.glob(f"{PREFIX}*")):
            with contextlib.suppress(OSError):
                file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                key, is_left = os.pread(file, len(self._key), 0), _lock(file) and os.fstat(file).st_nlink
                if is_left and taken is None and key == self._key and os.fstat(file).st_size == self._size:
                    taken = path, file
                    continue
                if is_left and (key[:32] != self._family or now - os.fstat(file).st_mtime > KEPT_S):
                    path.unlink()
                os.close(file)
        return taken

    def _create(self, directory: Path) -> tuple[Path, int]:
        path = directory / f"{PREFIX}{secrets.token_hex(8)}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        _lock(file)
        try:
            os.posix_fallocate(file, 0, self._size)  # now: what is missing later is a SIGBUS
        except OSError as error:
            path.unlink()
            os.close(file)
            free = os.statvfs(directory)
            raise ValueError(
                f"cache.host_gb: a stage needs {self._size / 1e9:.1f} GB in {directory}, where "
                f"{free.f_bavail * free.f_frsize / 1e9:.1f} GB are free ({error.strerror}): lower it, or give the "
                "container more shared memory"
            ) from None
        os.pwrite(file, self._key, 0)
        return path, file

    def begin(self, places: list[int]) -> None:
        """These are about to be written: until `keep` they hold nothing."""
        self._table["hash"][places] = b""

    def keep(self, places: list[int], hashes: bytes, sums: list[int]) -> None:
        """What they hold now."""
        self._table["sum"][places] = sums
        self._table["hash"][places] = np.frombuffer(hashes, "S16")
        os.utime(self._file)  # what is written through memory leaves no date

    def sums(self, places: list[int], hashes: bytes) -> list[int | None]:
        """The sum that each must have if it holds this; None if it does not."""
        held = self._table["hash"][places] == np.frombuffer(hashes, "S16")
        return [int(s) if h else None for s, h in zip(self._table["sum"][places], held, strict=True)]

    def close(self, keep: bool = False) -> None:
        """Give the memory back, unless it is to be kept for whoever comes: as if this process were killed."""
        if not keep:
            self._path.unlink(missing_ok=True)
        fcntl.flock(self._file, fcntl.LOCK_UN)  # the mapping has the file open, too
        os.close(self._file)


def _lock(file: int) -> bool:
    """Whether nobody else has it. The system takes it back from a process that ends, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def near(device: torch.device) -> Iterator[None]:
    """What is written first in here lies in the memory that is nearest to a GPU."""
    before = os.sched_getaffinity(0)
    try:
        if device.type == "cuda":
            os.sched_setaffinity(0, _cpus_near(device) & before or before)
        yield
    finally:
        os.sched_setaffinity(0, before)


def _cpus_near(device: torch.device) -> set[int]:
    """As the system says; none if it does not."""
    found = torch.cuda.get_device_properties(device)
    domain, bus, slot = (getattr(found, f"pci_{part}_id", 0) for part in ("domain", "bus", "device"))
    try:
        text = Path(f"/sys/bus/pci/devices/{domain:04x}:{bus:02x}:{slot:02x}.0/local_cpulist").read_text()
        ranges = [part.split("-") for part in text.strip().split(",") if part]
        return {cpu for first, *last in ranges for cpu in range(int(first), int((last or [first])[0]) + 1)}
    except (OSError, ValueError):
        return set()
