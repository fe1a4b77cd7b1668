"""Asks every node of a Ray cluster, measures the links between them, and has Ray find a place for one pipeline."""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.config import read_model
from cluster.launch import model_len
from cluster.sizing import stage_sizes
from deployments.check import is_here
from deployments.config import AppConfig
from deployments.placement import first_stage
from ops.preflight.checks import Finding, Needs, in_order, judge_clocks, judge_link, judge_nodes
from ops.preflight.facts import NodeFacts, Question, clock, gather
from ops.preflight.links import TIMEOUT_S, LinkEnd, LinkFigures

START_S, FACTS_S, CHECKSUMS_S, PLACE_S = 90.0, 90.0, 3600.0, 15.0
ALL_PAIRS = 8  # up to so many nodes every two of them are tried; beyond it, each with the next
CLOCK_TRIES = 5
HAPROXY_PORTS = {8404: "HAProxy's statistics", 9101: "HAProxy's metrics", 8500: "Serve's fallback proxy"}


class PreflightError(Exception):
    """The cluster cannot be asked; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be deployed."""

    config: AppConfig
    every_node_serves: bool  # proxy_location
    http_port: int
    bundles: list[dict[str, float]]
    strategy: str
    checksums: bool

    @property
    def ports(self) -> dict[int, str]:
        haproxy = HAPROXY_PORTS if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else {}
        return {self.http_port: "the service (http_options.port)", **haproxy}


@dataclass(frozen=True, slots=True)
class Report:
    """What was found, and what is wrong with it."""

    facts: Mapping[str, NodeFacts]
    clocks: Mapping[str, tuple[float, float]]
    links: Mapping[tuple[str, str], LinkFigures | str]
    findings: list[Finding]


def preflight(wanted: Wanted, address: str) -> Report:
    """Raises `PreflightError` if no cluster is at `address`, `ValueError` for a configuration that cannot work."""
    needs = needs_of(wanted.config)
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        raise PreflightError(
            f"no Ray cluster at {address} ({str(error).splitlines()[0][:200]}): run this on one of its nodes, with its "
            "RAY_AUTH_TOKEN, or give --address"
        ) from error
    try:
        return _ask(wanted, needs)
    finally:
        ray.shutdown()


def needs_of(config: AppConfig) -> Needs:
    """What a stage asks of its node; where the checkpoint is not on this one, its sizes are not asked for."""
    cuda = config.pipeline.device == "cuda"
    if not is_here(config.model.path):
        return Needs(gpus=config.pipeline.tensor_parallel if cuda else 0)
    model = read_model(config.model)
    sizes = stage_sizes(config, model)
    least = model_len(config, model)
    fraction = config.cache.memory_fraction
    step = config.scheduler.max_num_seqs / (len(sizes) + 1) * model.dim * 2  # hidden states of a batch that decodes
    return Needs(
        gpus=config.pipeline.tensor_parallel if cuda else 0,
        gpu_bytes=int(max(size.device_bytes(least, fraction) for size in sizes)) if cuda else 0,
        host_bytes=0 if cuda else int(max(s.weight_bytes for s in sizes) + 1e9 * (config.cache.memory_gb or 0)),
        bytes_per_s=step / 0.01 if len(sizes) > 1 else 0.0,  # in 10 ms, a fraction of a step
    )


def _ask(wanted: Wanted, needs: Needs) -> Report:
    nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    head = ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]")
    ordered = sorted(nodes, key=lambda node: (node != head, node))
    findings: list[Finding] = []
    actors = {node: _on(nodes[node]).remote() for node in ordered}
    facts = dict(_facts(wanted, actors, head, findings))
    clocks = {node: _offset(actors[node]) for node in facts}
    ends = {n: actors[n] for n, own in facts.items() if own.interface_problem is None and own.address}
    links = dict(_links(ends, {n: str(facts[n].address) for n in ends}))
    findings += judge_nodes(facts, needs, wanted.ports)
    findings += judge_clocks(clocks, needs)
    for pair, figures in links.items():
        findings += judge_link(pair, figures, needs)
    for actor in actors.values():
        ray.kill(actor)
    findings += _place(wanted, needs, links)
    return Report(facts, clocks, links, in_order(findings))


class Probe:
    """Lives on a node while it is asked."""

    def gather(self, node: str, question: Question) -> NodeFacts:
        return gather(node, question)

    def clock(self) -> float:
        return clock()

    def open(self, host: str, cuda: bool = False) -> None:
        self._end = LinkEnd(host, cuda)

    def listen(self) -> Any:
        return self._end.listen()

    def send(self, key: str) -> LinkFigures | str:
        return self._end.send(key)

    def receive(self, address: tuple[str, int], key: str) -> LinkFigures | str:
        return self._end.receive(address, key)


def _on(node_id: str) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(Probe).options(num_cpus=0, scheduling_strategy=strategy)


def _facts(
    wanted: Wanted, actors: Mapping[str, Any], head: str, findings: list[Finding]
) -> Iterator[tuple[str, NodeFacts]]:
    """Of every node that answers."""
    config, ports = wanted.config, wanted.ports
    split = config.pipeline.split
    asked = {}
    for node, actor in actors.items():
        question = Question(
            model_path=config.model.path if config.model.load_format == "auto" else None,
            stages=config.pipeline.stages,
            split=None if split == "auto" else split,
            checksums=wanted.checksums,
            ports=ports if node == head or wanted.every_node_serves else {},
            interface=config.pipeline.network_interface,
        )
        asked[node] = actor.gather.remote(node, question)
    deadline = time.monotonic() + START_S + (CHECKSUMS_S if wanted.checksums else FACTS_S)
    for node, ref in asked.items():
        try:
            yield node, ray.get(ref, timeout=max(1.0, deadline - time.monotonic()))
        except ray.exceptions.RayError as error:
            words = str(error).strip().splitlines()
            findings.append(
                Finding(
                    "node",
                    node,
                    f"does not answer: {words[-1][:200] if words else type(error).__name__}",
                    "look at Ray's logs there (/tmp/ray/session_latest/logs); is caravan installed on it?",
                )
            )


def _offset(actor: Any) -> tuple[float, float]:
    """How far a node's clock is ahead of ours, and how far that may be off: half of the quickest of several calls."""
    best = (0.0, float("inf"))
    for _ in range(CLOCK_TRIES):
        asked = time.time()
        there = ray.get(actor.clock.remote(), timeout=TIMEOUT_S)
        answered = time.time()
        best = min(best, (there - (asked + answered) / 2, (answered - asked) / 2), key=lambda found: found[1])
    return best


def _links(actors: Mapping[str, Any], hosts: Mapping[str, str]) -> Iterator[tuple[tuple[str, str], LinkFigures | str]]:
    """One pair after another, for they would share what is measured."""
    ray.get([actors[node].open.remote(hosts[node]) for node in actors])
    names = list(actors)
    pairs = list(combinations(names, 2)) if len(names) <= ALL_PAIRS else list(pairwise(names))
    for one, other in pairs:
        yield (one, other), measure(actors[one], actors[other])


def measure(sender: Any, receiver: Any) -> LinkFigures | str:
    """The link from one end to the other, or why there is none."""
    try:
        address, key = ray.get(sender.listen.remote(), timeout=2 * TIMEOUT_S)
        refs = [sender.send.remote(key), receiver.receive.remote(address, key)]
        sent, received = ray.get(refs, timeout=6 * TIMEOUT_S)
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[-1][:200]
    return received if isinstance(received, str) else sent  # who looks for the other one says it in fewer words


def _place(wanted: Wanted, needs: Needs, links: Mapping[tuple[str, str], object]) -> Iterator[Finding]:
    """Ray itself says whether a pipeline finds its place; on GPUs, its stages' links are measured there."""
    group = placement_group(wanted.bundles, strategy=wanted.strategy)
    try:
        if not group.wait(PLACE_S):
            free = {kind: round(amount, 2) for kind, amount in ray.available_resources().items() if ":" not in kind}
            shown = {kind: amount for kind, amount in free.items() if "memory" not in kind}
            yield Finding(
                "place", "",
                f"Ray finds no place for one pipeline of {wanted.bundles}, {wanted.strategy}: free are {shown}",
                "add nodes (their GPUs must be seen by ray start), end what holds them, or use fewer or smaller stages",
            )  # fmt: skip
        elif needs.gpus:
            yield from _gpu_links(wanted, needs, group)
    finally:
        remove_placement_group(group)


def _gpu_links(wanted: Wanted, needs: Needs, group: Any) -> Iterator[Finding]:
    """Between the stages, on their GPUs, by NCCL as they will use it."""
    first = first_stage(wanted.config)
    actors = []
    for i in range(first, len(wanted.bundles)):
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)
        gpus = wanted.bundles[i].get("GPU", 0)
        actors.append(ray.remote(Probe).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=strategy).remote())
    hosts = ray.get([actor.__ray_call__.remote(_host, wanted.config.pipeline.network_interface) for actor in actors])
    ray.get([actor.open.remote(host, True) for actor, host in zip(actors, hosts, strict=True)])
    for i, (one, other) in enumerate(pairwise(actors)):
        yield from judge_link((f"stage {i} {hosts[i]}", f"stage {i + 1} {hosts[i + 1]}"), measure(one, other), needs)
    for actor in actors:
        ray.kill(actor)


def _host(_: object, interface: str | None) -> str:
    from cluster.transport import interface_address

    return interface_address(interface) if interface else str(ray.util.get_node_ip_address())
