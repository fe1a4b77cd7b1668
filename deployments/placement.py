"""Where a pipeline's processes may run: the placement group of one engine replica."""

from collections.abc import Iterator, Sequence
from typing import Any

from deployments.config import AppConfig

SOME = 0.001  # of a resource that says what a node has: Ray gives each node 1 of it


def bundles(config: AppConfig) -> list[dict[str, float]]:
    """The engine's own process, then one bundle per stage; where each stage has a node of its own, the engine shares
    the first one's, or it would want a node too.
    """
    stage: dict[str, float] = {"CPU": config.resources.stage_cpus}
    if config.pipeline.device == "cuda":
        stage["GPU"] = config.resources.stage_gpus * config.pipeline.tensor_parallel
    if config.resources.accelerator_type is not None:
        stage[f"accelerator_type:{config.resources.accelerator_type}"] = SOME
    stages = [dict(stage) for _ in range(config.pipeline.stages)]
    if first_stage(config):
        return [{"CPU": config.resources.engine_cpus}, *stages]
    stages[0]["CPU"] += config.resources.engine_cpus
    return stages


def first_stage(config: AppConfig) -> int:
    """The bundle of stage 0."""
    return 0 if config.resources.placement == "STRICT_SPREAD" else 1


def options(config: AppConfig) -> dict[str, Any]:
    """Of the Serve deployment `Engine`."""
    group, labels = bundles(config), config.resources.node_labels
    selectors: list[dict[str, str]] = [{}] * first_stage(config) + [dict(labels)] * config.pipeline.stages
    return {
        "placement_group_bundles": group,
        "placement_group_strategy": config.resources.placement,
        **({"placement_group_bundle_label_selector": selectors} if labels else {}),
        # In a bundle that it shares with a stage, the stage holds what is reserved for both.
        "ray_actor_options": {"num_cpus": config.resources.engine_cpus if first_stage(config) else 0},
    }


def wrong_overrides(config: AppConfig, override: dict[str, Any]) -> Iterator[str]:
    """What `deployments[].Engine` says in a file and stages could not live with."""
    given: Sequence[dict[str, float]] | None = override.get("placement_group_bundles")
    if given is None:
        return
    wanted = bundles(config)
    if len(given) != len(wanted):
        yield f"placement_group_bundles: has {len(given)} bundles, {len(wanted)} are needed: {wanted}"
        return
    for i, (bundle, least) in enumerate(zip(given, wanted, strict=True)):
        if bundle.get("GPU", 0) < least.get("GPU", 0):
            yield (
                f"placement_group_bundles[{i}]: has {bundle.get('GPU', 0):g} GPUs, stage {i - first_stage(config)} "
                f"needs {least['GPU']:g}; leave it out, it follows from pipeline and resources"
            )
