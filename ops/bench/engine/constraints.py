"""What a constraint costs between tokens: `caravan bench constraints`.

Equal batches of streams on the engine alone, some free and some under a constraint that does not end before them, in
turns: a machine that drifts changes all of them alike.
"""

import json
import statistics
import time
from typing import Any

from rich.table import Table

from cluster.engine import Engine
from cluster.scheduling.sequence import Request
from deployments.config import AppConfig
from model.sampling_params import SamplingParams
from model.text.constraint import Constraint
from model.text.grammar import Masks
from model.text.tokenizer import load_tokenizer
from model.weights import resolve_path
from ops.bench import workload
from ops.bench.engine.run import Run, own_ray, running_engine

Json = dict[str, Any]
RECORDS = {
    "type": "array",
    "minItems": 500,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "kind": {"enum": ["llama", "alpaca", "vicuna", "guanaco"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 40},
            "weights": {"type": "array", "items": {"type": "number"}, "maxItems": 3},
        },
        "required": ["name", "kind", "age"],
    },
}
CONSTRAINTS = {
    "JSON schema": ("json_schema", json.dumps(RECORDS)),
    "regular expression": ("regex", r"([A-Z][a-z]+( [a-z]+)*[.?!] ){100,}"),
    "one that counts": ("regex", r"([A-Z][a-z]{1,12}( [a-z]{1,12}){2,10}[.?!] ){100,}"),
}
FREE = "free"


def bench_constraints(config: AppConfig, size: int, new_tokens: int, rounds: int) -> Json:
    """Milliseconds between tokens of `size` streams of each kind, and how much more than free text that is."""
    tokenizer = load_tokenizer(resolve_path(config.model.path))
    ends = tuple(sorted(tokenizer.eos_ids))
    seconds: dict[str, list[float]] = {kind: [] for kind in (FREE, *CONSTRAINTS)}
    with own_ray(config), running_engine(config) as (engine, run):
        masks = Masks(lambda: tokenizer, engine.pipeline.wake)
        for i in range(rounds + 1):
            for kind in seconds:
                found = CONSTRAINTS.get(kind)
                constraint = None if found is None else Constraint(found[0], found[1], ends)  # type: ignore[arg-type]
                value = _one_batch(engine, run, masks, constraint, (size, new_tokens), f"{kind}-{i}")
                if i:  # the first round warms up
                    seconds[kind].append(value)
        masks.close()
    costs = {
        kind: statistics.median(own / free for own, free in zip(values, seconds[FREE], strict=True)) - 1
        for kind, values in seconds.items()
    }
    return {
        "streams": size,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "inter_token_ms": {kind: round(1000 * statistics.median(values), 3) for kind, values in seconds.items()},
        "cost": {kind: round(cost, 4) for kind, cost in costs.items()},
    }


def _one_batch(
    engine: Engine, run: Run, masks: Masks, constraint: Constraint | None, shape: tuple[int, int], name: str
) -> float:
    """Seconds between tokens, the median of the streams."""
    size, new_tokens = shape
    ids = [f"{name}-{i}" for i in range(size)]
    sampling = [SamplingParams(max_tokens=new_tokens, seed=i, temperature=0.8) for i in range(size)]
    matchers = [None if constraint is None else masks.open(constraint, []) for _ in ids]
    run.expect(ids)
    for i, request_id in enumerate(ids):
        params = sampling[i] if constraint is None else sampling[i].constrained(constraint)
        prompt = workload.prompt(70_000 + i, 32)
        engine.add(Request(request_id=request_id, token_ids=prompt, sampling=params), matchers[i])
    run.wait()
    time.sleep(0.1)
    done = list(run.requests.values())
    assert all(p.tokens == new_tokens for p in done), "a constraint ended before its stream, or a stream failed"
    return statistics.median((p.last - p.first) / (p.tokens - 1) for p in done)


def constraints_table(result: Json) -> Table:
    table = Table("", "ms between tokens", "more than free text", title=f"{result['streams']} streams")
    for kind, ms in result["inter_token_ms"].items():
        table.add_row(kind, f"{ms:.2f}", f"{result['cost'][kind]:+.1%}")
    return table
