"""How much of a GPU a stage takes for its KV cache."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model import memory

TOTAL, WEIGHTS, ACTIVATIONS = 80_000_000_000, 10_000_000_000, 2_000_000_000


def budget(monkeypatch: pytest.MonkeyPatch, free: int, share: float) -> int:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, TOTAL))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: WEIGHTS)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(memory, "_activation_bytes", lambda *_: [ACTIVATIONS])
    group: Any = SimpleNamespace(devices=["cuda"])
    return memory.kv_budgets(group, 0.9, 256, 2048, 16, share=share)[0]


@pytest.mark.parametrize("neighbour", [0, WEIGHTS, 36_000_000_000])
def test_stages_that_share_a_gpu_stay_within_their_shares(monkeypatch: pytest.MonkeyPatch, neighbour: int) -> None:
    """Whatever the other one has taken when it is measured: both together take what one would."""
    free = TOTAL - WEIGHTS - memory.CONTEXT_BYTES - neighbour
    taken = WEIGHTS + memory.CONTEXT_BYTES + ACTIVATIONS + memory.GRAPH_BYTES + budget(monkeypatch, free, 0.5)
    assert taken == 0.5 * 0.9 * TOTAL


def test_whoever_has_a_gpu_alone_counts_all_that_lives_there(monkeypatch: pytest.MonkeyPatch) -> None:
    strangers = 5_000_000_000
    free = TOTAL - WEIGHTS - strangers
    expected = int(0.9 * TOTAL) - WEIGHTS - strangers - ACTIVATIONS - memory.GRAPH_BYTES
    assert budget(monkeypatch, free, 1.0) == expected
