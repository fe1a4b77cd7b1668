"""What the scaling run measures on a kind of machine, and how each of its rows is configured."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from ops.bench import workload

Json = dict[str, Any]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured on a kind of machine."""

    device: Device
    shape: str
    max_model_len: int
    rows: tuple[tuple[str, int], ...]  # (precision, stages)
    http_stages: int  # of each pipeline behind an endpoint
    haproxy: bool  # whether it is Serve's ingress, or Serve's own proxy
    requests_per_stage: int
    longest: int  # prompts and outputs of the list are cut to this
    seqs_per_stage: int  # in steady decode
    context: int  # tokens of each of them
    streams_per_pipeline: int  # over HTTP
    max_num_seqs: tuple[int, int]  # at least, and per stage
    cache: Json
    scheduler: Json
    resources: Json

    @property
    def precision(self) -> str:
        """Of the pipelines behind an endpoint."""
        return self.rows[0][0]


PLANS: dict[str, Plan] = {
    "cuda": Plan(
        device="cuda",
        shape="llama-2-70b",
        max_model_len=4096,
        rows=(*(("fp8", n) for n in (1, 2, 4, 8)), *(("bfloat16", n) for n in (2, 4, 8))),
        http_stages=4,
        haproxy=True,
        requests_per_stage=600,
        longest=workload.LONGEST,
        seqs_per_stage=128,
        context=450,
        streams_per_pipeline=256,
        max_num_seqs=(256, 256),
        cache={"memory_fraction": 0.92, "prefix_caching": False},
        scheduler={"max_num_batched_tokens": 512, "policy": "longest_first"},
        resources={},
    ),
    "one-gpu": Plan(  # all stages take turns on it: shows that the run works, not how pipelines scale
        device="cuda",
        shape="test-50m",
        max_model_len=2048,
        rows=tuple(("bfloat16", n) for n in (1, 2, 4, 8)),
        http_stages=1,
        haproxy=False,
        requests_per_stage=64,
        longest=256,
        seqs_per_stage=16,
        context=200,
        streams_per_pipeline=32,
        max_num_seqs=(64, 32),
        cache={"memory_gb": 1.0, "prefix_caching": False},
        scheduler={"max_num_batched_tokens": 1024},
        resources={"stage_gpus": 0.125},
    ),
    "cpu": Plan(
        device="cpu",
        shape="test-50m",
        max_model_len=1024,
        rows=tuple(("bfloat16", n) for n in (1, 2, 4, 8)),
        http_stages=1,
        haproxy=False,
        requests_per_stage=8,
        longest=64,
        seqs_per_stage=4,
        context=100,
        streams_per_pipeline=8,
        max_num_seqs=(64, 0),
        cache={"memory_gb": 0.2, "prefix_caching": False},
        scheduler={"max_num_batched_tokens": 512},
        resources={"gateway_cpus": 0.1, "engine_cpus": 0.1, "stage_cpus": 0.1},
    ),
}


def row_names(plan: Plan) -> list[str]:
    """In the order in which they are measured."""
    http = [f"{kind}x{plan.http_stages}" for kind in ("http-1", "http-2", "killed-2")]
    return [f"{precision}x{stages}" for precision, stages in plan.rows] + http


def is_row(plan: Plan, name: str) -> bool:
    """One of those, or pipelines of another number of stages: http-1x2 is one of two."""
    return name in row_names(plan) or re.fullmatch(r"(http-[12]|killed-2)x[1-9]\d*", name) is not None


def serve_config(plan: Plan, precision: str, stages: int, pipelines: int = 1) -> Json:
    """The Serve configuration of a row."""
    cuda = plan.device == "cuda"
    least, per_stage = plan.max_num_seqs
    scheduler = {**plan.scheduler, "max_num_seqs": max(least, per_stage * stages)}
    model = {"path": f"shape:{plan.shape}", "name": plan.shape, "load_format": "dummy", "dtype": "bfloat16"}
    if precision == "fp8":
        model["quantization"] = "fp8"
    args = {
        "model": {**model, "max_model_len": plan.max_model_len},
        "pipeline": {"stages": stages, "device": plan.device},
        "cache": plan.cache,
        "scheduler": scheduler,
        "gateway": {"replicas": 4 * pipelines if cuda else 1},
        "autoscaling": {"min_replicas": pipelines, "max_replicas": pipelines},
        "resources": plan.resources,
    }
    application = {"name": "caravan", "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
    return {
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [application],
    }


def too_few(plan: Plan, stages: int, gpus: int) -> Json | None:
    """The row of a pipeline that the machine has too few GPUs for, else None."""
    needed = math.ceil(stages * plan.resources.get("stage_gpus", 1))
    if plan.device == "cpu" or gpus >= needed:
        return None
    return {"skipped": f"needs {needed} GPUs, this machine has {gpus}"}
