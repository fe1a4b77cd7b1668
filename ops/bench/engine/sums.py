"""`caravan bench sums`: what it takes to add up a step's rows over two GPUs, with the residual and the norm."""

import statistics
from contextlib import ExitStack
from typing import Any

import torch
from rich.table import Table

from model.group import on
from model.kernels import Kernels, kernels_for

Json = dict[str, Any]
REPEATED, LOOKS, PATIENCE = 100, 9, 10_000_000


@torch.inference_mode()
def bench_sums(width: int, rows: list[int]) -> list[Json]:
    """Of `rows` of `width` bfloat16 values each: microseconds in a captured graph, beside the norm on one GPU alone."""
    devices = [torch.device("cuda", i) for i in range(2)]
    return [
        {"rows": n, "us": _us(devices, n, width, sums=True), "norm_alone_us": _us(devices[:1], n, width, sums=False)}
        for n in rows
    ]


def _us(devices: list[torch.device], rows: int, width: int, sums: bool) -> float:
    from model.kernels.peers import PeerKernels, connected

    peers = connected(devices, rows, width, [range(i, i + 1) for i in range(len(devices))], torch.bfloat16)
    kernels: list[Kernels] = [PeerKernels(p) if sums else kernels_for(d) for p, d in zip(peers, devices, strict=True)]
    graphs = []
    for kernel, device in zip(kernels, devices, strict=True):
        with on(device):
            graphs.append(_captured(kernel, rows, width, device))
    for p in peers:
        p.reset()
        p.be_patient(PATIENCE)
    times = [_seconds(graphs, devices) for _ in range(LOOKS)]
    assert not any(int(p.alarm) for p in peers), "a GPU has waited in vain"
    return round(1e6 * statistics.median(times) / REPEATED, 2)


def _captured(kernel: Kernels, rows: int, width: int, device: torch.device) -> torch.cuda.CUDAGraph:
    x, residual = (torch.randn(rows, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    weight = torch.ones(width, dtype=torch.bfloat16, device=device)
    kernel.add_rms_norm(x, residual, weight, 1e-5)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(REPEATED):
            kernel.add_rms_norm(x, residual, weight, 1e-5)
    return graph


def _seconds(graphs: list[torch.cuda.CUDAGraph], devices: list[torch.device]) -> float:
    """Of all graphs at once, by the clock of the first GPU."""
    for device in devices:
        torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with ExitStack() as stack:
        for graph, device in reversed(list(zip(graphs, devices, strict=True))):
            stack.enter_context(on(device))
            if device == devices[0]:
                start.record()
            graph.replay()
        end.record()
    for device in devices:
        torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1000


def sums_table(result: Json) -> Table:
    """For people."""
    table = Table(
        "rows", "sum, residual and norm", "norm alone", title=f"two {result['device']}, rows of {result['width']}"
    )
    for row in result["sums"]:
        table.add_row(str(row["rows"]), f"{row['us']} us", f"{row['norm_alone_us']} us")
    return table
