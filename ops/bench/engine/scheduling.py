"""What a decode step costs the scheduler itself: `caravan bench scheduler`.

The scheduler is the real one; in place of stages every token is the same. Time is the processor's, of `schedule` and
`update` together, in steady decode of so many sequences on one stage, prefix caching on. nano-vllm's scheduler, which
knows greedy and sampled rows but no penalties, tenants, logprobs or stages, takes 0.13 ms for 256 (its `schedule` and
`postprocess`, on the machine and day on which this one took 0.32).
"""

import time
from typing import Any

from rich.table import Table

from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.sequence import Request
from model.batch import Batch, StepOutput
from model.sampling_params import SamplingParams

PROMPT, STEPS, BLOCK_SIZE = 32, 64, 16  # tokens, of each a few fewer than of the one before; steps of a mean
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.9},
}


def step_ms(num_seqs: int, kind: str, repeats: int) -> float:
    """The least of several means, each of `STEPS` steps that have all sequences in them."""
    longest = PROMPT + (repeats + 2) * STEPS
    blocks = BlockManager(num_seqs * -(-longest // BLOCK_SIZE), BLOCK_SIZE)
    batched = max(8192, num_seqs)
    scheduler = Scheduler(blocks, depth=1, max_num_seqs=num_seqs, max_num_batched_tokens=batched, max_model_len=4096)
    for i in range(num_seqs):
        prompt = [i, *range(PROMPT - 1 - i % BLOCK_SIZE)]  # blocks are full now here, now there
        sampling = SamplingParams(max_tokens=longest - PROMPT, seed=i, stop_token_ids=(2,), **KINDS[kind])
        scheduler.add(Request(request_id=f"request-{i:08}", token_ids=prompt, sampling=sampling))
    while (batch := _step(scheduler)).num_tokens > num_seqs or batch.num_seqs < num_seqs:
        pass
    seconds = []
    for _ in range(repeats):
        started = time.thread_time()
        for _ in range(STEPS):
            _step(scheduler)
        seconds.append((time.thread_time() - started) / STEPS)
    return round(1000 * min(seconds), 4)


def _step(scheduler: Scheduler) -> Batch:
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.update(batch, StepOutput(batch.epoch, batch.step_id, [7] * len(batch.sample_rows), {}))
    return batch


def bench_scheduler(sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds a step of each size, and each kind of sequence."""
    return [{"sequences": size, "kind": kind, "ms": step_ms(size, kind, repeats)} for size in sizes for kind in KINDS]


def scheduler_table(results: list[dict[str, Any]]) -> Table:
    """For people."""
    shown = Table("sequences", "kind", "ms a step", "us a sequence", title="schedule + update, processor time")
    for r in results:
        shown.add_row(f"{r['sequences']:,}", r["kind"], f"{r['ms']:.3f}", f"{1000 * r['ms'] / r['sequences']:.2f}")
    return shown
