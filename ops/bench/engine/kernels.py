"""`caravan bench kernels`: decode attention and prefill on one GPU, as shares of what it can read and multiply."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.table import Table

from model.attention import pieces_of
from model.batch import Batch
from model.config import ModelConfig, split_layers
from model.kernels import PROMPT_QUERIES, Pieces, kernels_for, piece_tokens
from model.kv_cache import FLOAT8, KVCache
from model.llama import Decoder
from model.stage import Stage
from model.weights import read_config, resolve_path
from model.weights.dummy import DummyCheckpoint

Json = dict[str, Any]
BLOCK = 16
READ_BYTES = 4 * 2**30  # far more than any cache holds
ROTATED_BYTES = 300_000_000  # caches are used in turns, so that none is in the L2 from the time before
PROMPTS = ((0, 4096), (3584, 512), (12_288, 2048))  # tokens in the cache, tokens now
TILINGS = ((64, 8, 3), (64, 8, 4), (64, 4, 3), (128, 8, 2), (128, 8, 3), (32, 4, 4))  # see PieceTiling
PRODUCT = 8192  # rows, inner elements and columns of the product that stands for what the device can do


@torch.inference_mode()
def bench_kernels(model: str, layers: int, chunk: int, attention: list[tuple[int, int]]) -> Json:
    """Of the shape `model`: decode attention of (sequences, context) each, prefill of `chunk` tokens over `layers`."""
    config = read_config(resolve_path(model))
    device = torch.device("cuda")
    reads = read_rate(device)
    return {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__},
        "bytes_per_s_read": reads,
        "attention": [
            attention_figures(config, sequences, context, dtype, reads, device)
            for sequences, context in attention
            for dtype in (torch.bfloat16, FLOAT8)
        ],
        "prefill_attention": [
            prompt_attention_figures(config, before, now, dtype, device)
            for before, now in PROMPTS
            for dtype in (torch.bfloat16, FLOAT8)
        ],
        "prefill": prefill_figures(replace(config, n_layers=layers), chunk, device),
    }


def read_rate(device: torch.device) -> float:
    """Bytes per second of a read-only stream."""
    from model.kernels.reading import read_through

    source = torch.randint(0, 255, (READ_BYTES,), dtype=torch.uint8, device=device)
    return READ_BYTES / graph_seconds(lambda i: read_through(source), 4)


def attention_figures(
    config: ModelConfig, sequences: int, context: int, dtype: torch.dtype, reads: float, device: torch.device
) -> Json:
    """Decode attention of one layer, its queries included, over sequences of equal length."""
    blocks = -(-context // BLOCK)
    size = sequences * context * KVCache.bytes_per_block(config, 1, 1, dtype)
    copies = max(2, ROTATED_BYTES // size + 1)
    kv = KVCache(config, copies, sequences * blocks, BLOCK, dtype, device)
    for layer in range(copies):
        _fill(kv, layer, config, device)
    q = torch.randn(sequences, config.n_heads, config.head_dim, dtype=torch.bfloat16, device=device)
    tables = torch.randperm(sequences * blocks, device=device).view(sequences, blocks)
    slots = torch.arange(sequences, device=device)
    lens = torch.full((sequences,), context, device=device)
    kernels = kernels_for(device)

    def attend(i: int) -> None:
        kernels.decode_attention(q, kv.k[i % copies], kv.v[i % copies], tables, slots, lens)

    seconds = graph_seconds(attend, max(8, copies))
    return {
        "heads": f"{config.n_heads}:{config.n_kv_heads}",
        "sequences": sequences,
        "context_tokens": context,
        "kv_type": str(dtype).removeprefix("torch."),
        "us": round(1e6 * seconds, 2),
        "bytes_per_s": size / seconds,
        "share_of_read_rate": round(size / seconds / reads, 3),
    }


def prompt_attention_figures(
    config: ModelConfig, before: int, now: int, dtype: torch.dtype, device: torch.device
) -> Json:
    """Attention of one layer of `now` tokens of a prompt of which `before` are in the cache.

    In TFLOP/s: where keys lie, in each tiling (none: it does not fit), and with keys gathered first.
    """
    from model.kernels.fused import gathered_attention
    from model.kernels.piece_attention import PieceTiling, piece_attention

    total = before + now
    kv = KVCache(config, 1, -(-total // BLOCK), BLOCK, dtype, device)
    _fill(kv, 0, config, device)
    q = torch.randn(now, config.n_heads, config.head_dim, dtype=torch.bfloat16, device=device)
    table = torch.randperm(kv.num_blocks, device=device)
    slots, lens = torch.zeros(now, dtype=torch.int64, device=device), torch.arange(before + 1, total + 1, device=device)
    starts, counts = pieces_of(np.array([now], np.int32), piece_tokens(config.groups, PROMPT_QUERIES))
    first, many = (torch.from_numpy(part[::-1].copy()).int().to(device) for part in (starts, counts))
    pieces, out = Pieces(first, many, lens), torch.empty_like(q)
    position = torch.arange(total, device=device)
    cells = table[position // BLOCK].long() * BLOCK + position % BLOCK
    of_queries, of_keys = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (now, total))
    flops = 4.0 * config.n_heads * config.head_dim * (now * before + now * (now + 1) / 2)

    def rate(work: Callable[[], object]) -> float | None:
        try:
            return round(flops / stream_seconds(work, 20) / 1e12, 1)
        except Exception:  # more shared memory than there is
            return None

    k, v = kv.k[0], kv.v[0]

    def in_place(tiling: tuple[int, int, int]) -> Callable[[], object]:
        how = PieceTiling(*tiling)
        return lambda: piece_attention(q, k, v, table[None], slots, lens, pieces, PROMPT_QUERIES, out, how)

    return {
        "tokens_before": before,
        "tokens": now,
        "kv_type": str(dtype).removeprefix("torch."),
        "tflops_in_place": {",".join(map(str, tiling)): rate(in_place(tiling)) for tiling in TILINGS},
        "tflops_gathered": rate(lambda: gathered_attention(q, k, v, cells, of_queries, of_keys, now, total)),
    }


def _fill(kv: KVCache, layer: int, config: ModelConfig, device: torch.device) -> None:
    """Random keys and values, by way of the kernel that writes them."""
    cells = torch.arange(kv.num_blocks * BLOCK, device=device)
    rotary = torch.randn(1, config.head_dim // 2, 2, device=device)
    width = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    for part in torch.split(cells, 16_384):
        qkv = torch.randn(len(part), width, dtype=torch.bfloat16, device=device)
        kernels_for(device).rotate_and_write(
            qkv, config.n_heads, rotary, torch.zeros_like(part), kv.k[layer], kv.v[layer], part
        )


def prefill_figures(config: ModelConfig, chunk: int, device: torch.device) -> Json:
    """A whole step of one prompt of `chunk` random tokens, beside a large product right before and after it."""
    (part,) = split_layers(config, 1)
    tensors = DummyCheckpoint(config, device=device).tensors(part.tensor_names(config))
    decoder = Decoder(config, part, tensors, torch.bfloat16, device, config.context_length)
    blocks = -(-chunk // BLOCK)
    stage = Stage(decoder, blocks, BLOCK, 1)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, chunk).astype(np.int32)
    batch = Batch.of_one(ids, BLOCK)
    linear = 2.0 * chunk * config.n_layers * config.layer_parameters
    attention = 4.0 * config.n_layers * config.n_heads * config.head_dim * chunk * (chunk + 1) / 2
    a, b = (torch.randn(PRODUCT, PRODUCT, dtype=torch.bfloat16, device=device) for _ in range(2))
    before = stream_seconds(lambda: a @ b, 40)
    seconds = stream_seconds(lambda: stage.run(batch, None), 8)
    after = stream_seconds(lambda: a @ b, 40)
    product = 2.0 * PRODUCT**3 / statistics.mean((before, after))
    return {
        "layers": config.n_layers,
        "chunk": chunk,
        "ms": round(1000 * seconds, 3),
        "flops_product": product,
        "flops": (linear + attention) / seconds,
        "flops_linear_layers": linear / seconds,
        "share_of_product": round((linear + attention) / seconds / product, 3),
    }


def graph_seconds(work: Callable[[int], object], count: int, replays: int = 7) -> float:
    """Median time of one of `count` calls, work(0), work(1) ..., in one CUDA graph."""
    for i in range(2):
        work(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            work(i)
    graph.replay()
    return statistics.median(_seconds(graph.replay) for _ in range(replays)) / count


def stream_seconds(work: Callable[[], object], count: int) -> float:
    """Mean time of `count` calls, one launched after another."""
    for _ in range(3):
        work()
    return _seconds(lambda: [work() for _ in range(count)]) / count


def _seconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


def kernels_table(result: Json) -> Table:
    """For people."""
    reads, prefill = result["bytes_per_s_read"], result["prefill"]
    table = Table("", "", "share", title=f"{result['device']}: {reads / 1e12:.2f} TB/s read")
    for done in result["attention"]:
        name = f"decode attention {done['heads']}, {done['sequences']} x {done['context_tokens']}, {done['kv_type']}"
        rate = f"{done['us']:.1f} us, {done['bytes_per_s'] / 1e12:.2f} TB/s"
        table.add_row(name, rate, f"{done['share_of_read_rate']:.1%}")
    for done in result["prefill_attention"]:
        name = f"{done['tokens']} tokens of a prompt after {done['tokens_before']}, {done['kv_type']}"
        best = max((rate or 0.0, tiling) for tiling, rate in done["tflops_in_place"].items())
        table.add_row(name, f"{best[0]} TFLOP/s in place ({best[1]}), {done['tflops_gathered']} gathered", "")
    rate = f"{prefill['flops'] / 1e12:.0f} of {prefill['flops_product'] / 1e12:.0f} TFLOP/s"
    table.add_row(f"prefill of {prefill['chunk']} tokens", rate, f"{prefill['share_of_product']:.1%}")
    return table
