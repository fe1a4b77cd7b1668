"""Who holds a GPU, from a listing of nvidia-smi; the driver itself is not here."""

from types import SimpleNamespace

import pytest
import torch

from cluster.stages import gpu_guard
from cluster.stages.gpu_guard import Holder, check_free, holders, parse

LISTING = """GPU-aa, 4711, 70210, python train.py, --fast
GPU-bb, 12, [N/A], /usr/bin/other
No running processes found
"""


def test_the_listing_is_read() -> None:
    assert parse(LISTING) == [
        Holder("GPU-aa", 4711, 70210, "python train.py, --fast"),
        Holder("GPU-bb", 12, 0, "/usr/bin/other"),
    ]
    assert parse("") == []


def test_no_nvidia_smi_is_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_guard, "QUERY", ("no-such-program-here",))
    assert holders() == []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A GPU of 80 GB; the list says how much of it is free, look by look, the last value staying."""
    free: list[int] = []
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda _: (free.pop(0) if len(free) > 1 else free[0], 80_000_000_000)
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="NVIDIA H100", uuid="aa"))
    monkeypatch.setattr(gpu_guard, "holders", lambda: parse(LISTING))
    monkeypatch.setattr(gpu_guard, "POLL_S", 0.001)
    monkeypatch.setattr(gpu_guard, "FREED_S", 0.02)
    return free


def test_a_foreign_process_is_named(gpu: list[int]) -> None:
    gpu.append(6_000_000_000)
    with pytest.raises(ValueError, match=r"NVIDIA H100 is not free: 74\.0 GB .* pid 4711 \(python train"):
        check_free(torch.device("cuda"))


def test_memory_that_comes_back_in_time_is_fine(gpu: list[int]) -> None:
    gpu.extend([6_000_000_000, 6_000_000_000, 79_000_000_000])
    check_free(torch.device("cuda"))
