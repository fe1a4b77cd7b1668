"""Sums over GPUs by kernels that write into each other's memory, against plain sums."""

from itertools import pairwise

import pytest
import torch

from model.kernels import Quantized
from model.kernels.reference import ReferenceKernels

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
WIDTH, WORDS, ROWS = 1536, 1000, 600
PATIENCE = 5_000_000


def connected(dtype: torch.dtype, count: int = 2) -> list:
    from model.kernels.peers import PeerKernels
    from model.kernels.peers import connected as connect

    bounds = [i * WORDS // count for i in range(count + 1)]
    words = [range(a, b) for a, b in pairwise(bounds)]
    made = connect([torch.device("cuda", i) for i in range(count)], ROWS, WIDTH, words, dtype)
    warm_up = [PeerKernels(peers) for peers in made]
    for rows in (1, 64):  # nothing waits while kernels are compiled
        for kernels in warm_up:
            run(kernels, torch.zeros(rows, WIDTH, dtype=dtype), torch.zeros(rows, WIDTH, dtype=dtype))
    synchronize()
    for peers in made:
        peers.reset()
        peers.be_patient(PATIENCE)
    return warm_up


def synchronize() -> None:
    for i in range(GPUS):
        torch.cuda.synchronize(i)


def run(kernels, share, residual, quantize=False):  # type: ignore[no-untyped-def]
    device = kernels._peers.turns.device
    weight = torch.linspace(0.5, 1.5, WIDTH, dtype=share.dtype, device=device)
    with torch.cuda.device(device):
        residual = None if residual is None else residual.to(device, copy=True)
        return kernels.add_rms_norm(share.to(device), residual, weight, 1e-5, quantize)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_right_and_the_same_on_all(dtype: torch.dtype, quantize: bool) -> None:
    all_ = connected(dtype, GPUS)
    torch.manual_seed(0)
    for turn, rows in enumerate([1, 3, 32, 33, 64, 1, 1, 500, 20, 600, 2]):
        shares = [torch.randn(rows, WIDTH).to(dtype) for _ in all_]
        residual = torch.randn(rows, WIDTH).to(dtype) if turn % 3 else None
        found = [run(k, s, residual, quantize) for k, s in zip(all_, shares, strict=True)]
        synchronize()
        total = sum(s.float() for s in shares) + (residual.float() if residual is not None else 0.0)
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        expected, _ = ReferenceKernels().add_rms_norm(total, None, torch.linspace(0.5, 1.5, WIDTH), 1e-5)
        assert isinstance(expected, torch.Tensor)
        for out, sums in found:
            assert torch.equal(sums.cpu(), found[0][1].cpu())
            torch.testing.assert_close(sums.cpu().float(), total, atol=bound, rtol=bound)
            values = out.values.float() * out.scales if isinstance(out, Quantized) else out.float()
            bound_out = 0.1 if quantize else 2 * bound
            torch.testing.assert_close(values.cpu(), expected, atol=bound_out, rtol=bound_out)
    assert not any(int(k._peers.alarm) for k in all_)


def test_columns_come_together_on_the_first() -> None:
    all_ = connected(torch.bfloat16)
    for turn, rows in enumerate([1, 5, 512, 3]):
        whole = torch.randn(rows, WORDS) + turn
        for kernels in reversed(all_):
            p = kernels._peers
            device = p.turns.device
            with torch.cuda.device(device):
                kernels.add_rms_norm(
                    torch.zeros(rows, WIDTH, dtype=torch.bfloat16, device=device), None,
                    torch.ones(WIDTH, dtype=torch.bfloat16, device=device), 1e-5,
                )  # fmt: skip
                found = kernels.gather(whole[:, p.words[p.rank].start : p.words[p.rank].stop].to(device).contiguous())
        synchronize()
        assert torch.equal(found.cpu(), whole)


def test_captured_sums_give_the_same_again_and_again() -> None:
    all_ = connected(torch.bfloat16)
    inputs = [torch.randn(4, WIDTH).bfloat16().to(k._peers.turns.device) for k in all_]
    graphs, outs = [], []
    for kernels, x in zip(all_, inputs, strict=True):
        device = x.device
        with torch.cuda.device(device):
            weight = torch.ones(WIDTH, dtype=torch.bfloat16, device=device)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                y = x
                for _ in range(7):
                    y, _total = kernels.add_rms_norm(y, None, weight, 1e-5)
            graphs.append(graph)
            outs.append(y)
    seen = []
    for _ in range(20):
        for x, graph in zip(inputs, graphs, strict=True):
            with torch.cuda.device(x.device):
                graph.replay()
        synchronize()
        seen.append([out.cpu().clone() for out in outs])
    assert all(torch.equal(a, seen[0][0]) for pair in seen for a in pair)
    assert not any(int(k._peers.alarm) for k in all_)


@pytest.mark.parametrize("rows", [2, 100])
def test_who_waits_in_vain_gives_up_and_says_so(rows: int) -> None:
    first, _ = connected(torch.bfloat16)
    first._peers.be_patient(1000)
    for _ in range(50):  # what follows does not wait again
        run(first, torch.zeros(rows, WIDTH, dtype=torch.bfloat16), None)
    torch.cuda.synchronize(0)
    assert int(first._peers.alarm) == 1
