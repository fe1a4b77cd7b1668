"""One stage as a Ray actor: load once; then, for every epoch, link and run until told to stop.

The engine calls `load`, then `listen`, `link` and `run`, whose end (or the actor's death) is how it learns that
something went wrong. A stage that only lost a neighbour keeps its weights and is linked again at the next epoch.
A stage executes batches in order, checks epoch and step id, and decides nothing.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import ray
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cluster.config import FLOAT8_NEEDS_CUDA, EngineConfig, PipelineArgs, in_8_bits, read_model
from cluster.pipeline import Doing, max_in_flight
from cluster.stages.gpu_guard import check_free
from cluster.stages.link import DOWNSTREAM, UPSTREAM, Link, close_all
from cluster.stages.rendezvous import Rendezvous, join, make_link, make_token_link
from cluster.stages.stage_loop import LINK_MARGIN_S, StageLoop
from cluster.transport import ControlAddress, ControlClient, Ready, interface_address
from model.adapters.store import AdapterArgs, StageAdapters
from model.config import ModelConfig, StageLayers, product_of
from model.group import DecoderGroup
from model.heap import freed_blocks_returned, freeze_heap
from model.host_copies.copier import STAGING_BYTES, window_of
from model.kv_cache import FLOAT8, KVCache
from model.llama import Decoder
from model.memory import kv_budgets
from model.stage import Stage
from model.weights import Checkpoint, open_checkpoint, resolve_path
from model.weights.dummy import DummyCheckpoint

log = logging.getLogger(__name__)

COPY_BUFFERS = 4  # that copies of blocks need on a GPU: two that stay, and what is gathered for a moment


@dataclass(frozen=True, slots=True)
class StageSpec:
    """What one stage is."""

    index: int
    layers: StageLayers
    config: EngineConfig
    max_model_len: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a stage holds once its weights are loaded."""

    node: str  # address of its node
    pid: int
    num_parameters: int
    num_blocks: int  # KV blocks it has memory for
    num_places: int  # copies of blocks it has host memory for
    copy_window: int  # how many of them it copies out at once
    visible_devices: str | None  # CUDA_VISIBLE_DEVICES of its process


class StageActor:
    """The body of the actor; `ray.remote` is applied where it is placed."""

    def __init__(self, spec: StageSpec) -> None:
        pipeline = spec.config.pipeline
        torch.set_num_threads(pipeline.threads)
        self._spec = spec
        self._devices = devices_of(pipeline)
        self._device = self._devices[0]
        self._link_device = self._device if pipeline.link == "auto" else torch.device("cpu")  # where links end
        self._host = (
            interface_address(pipeline.network_interface)
            if pipeline.network_interface
            else ray.util.get_node_ip_address()
        )
        self._loaded = 0.0
        self._stage: Stage | None = None
        self._loop: StageLoop | None = None
        self._rendezvous: Rendezvous | None = None
        self._upstream: Link | None = None
        self._downstream: Link | None = None
        self._tokens: Link | None = None  # on the last stage and the first

    def progress(self) -> float:
        """Share of the weights loaded, 0 to 1."""
        return self._loaded

    def pid(self) -> int:
        return os.getpid()

    def doing(self) -> Doing:
        """What `run` does at this moment; an answer at all says that the process lives."""
        loop = self._loop  # which may end meanwhile
        return loop.doing if loop is not None else Doing("idle")

    def load(self, predecessor: LoadReport | None) -> LoadReport:
        """Read this stage's share of the checkpoint; raises `ValueError` naming what is wrong with it.

        A stage that replaces another one holds as many KV blocks as that one did, instead of what there is room for.
        If it was started as a spare, Ray gave it no GPU: it takes the one that its predecessor has left.
        """
        if predecessor is not None and predecessor.visible_devices and not os.environ.get("CUDA_VISIBLE_DEVICES"):
            os.environ["CUDA_VISIBLE_DEVICES"] = predecessor.visible_devices
        spec, config = self._spec, self._spec.config
        if self._device.type == "cuda" and self._gpu_share() >= 1:
            for device in self._devices:
                check_free(device)
        path = resolve_path(config.model.path)
        dummy = config.model.load_format == "dummy"
        checkpoint: Checkpoint = (
            DummyCheckpoint(read_model(config.model), device=self._device) if dummy else open_checkpoint(path)
        )
        names = spec.layers.tensor_names(checkpoint.config)
        dtype = getattr(torch, config.model.dtype)
        fp8 = in_8_bits(config.model, checkpoint.config)
        if fp8 and self._device.type != "cuda":
            raise ValueError(FLOAT8_NEEDS_CUDA)
        self._log_weights(checkpoint.config, names, fp8)
        with freed_blocks_returned():
            decoders = Decoder.sharded(
                checkpoint.config,
                spec.layers,
                checkpoint.tensors(names),
                dtype,
                self._devices,
                spec.max_model_len,
                self._counter(checkpoint, names),
                fp8,
            )
        self._group = DecoderGroup(decoders)
        if len(decoders) > 1 and self._device.type == "cuda":
            most = max(config.scheduler.max_num_batched_tokens, config.max_decodes)
            self._group.connect(most, config.pipeline.step_timeout_s + LINK_MARGIN_S)
        model = config.model
        args = AdapterArgs(model.num_adapters, model.max_adapter_rank)
        self._adapters = StageAdapters(self._group, args) if args.on_device else None
        self._loaded = 1.0
        num_blocks = self._num_blocks() if predecessor is None else predecessor.num_blocks
        places, window = self._num_places(), min(map(window_of, self._block_bytes()))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        parameters = sum(decoder.num_parameters for decoder in decoders)
        return LoadReport(self._host, os.getpid(), parameters, num_blocks, places, window, visible)

    def _log_weights(self, config: ModelConfig, names: list[str], fp8: frozenset[str]) -> None:
        dtype = self._spec.config.model.dtype
        gb = sum(config.tensor_bytes(name, getattr(torch, dtype).itemsize, fp8) for name in names) / 1e9
        products = {product for name in names if (product := product_of(name))}
        kept = f", but for {len(products - fp8)} of {len(products)} products in {dtype}" if products - fp8 else ""
        how = f"layers in 8 bits{kept}" if fp8 else dtype
        log.info("stage %d: %.2f GB of weights, %s", self._spec.index, gb, how)

    def _counter(self, checkpoint: Checkpoint, names: list[str]) -> Callable[[str], None]:
        """Called with the name of each tensor that is in place; keeps `progress` true and logs every tenth."""
        dummy = isinstance(checkpoint, DummyCheckpoint)
        sizes = {name: 1 if dummy else checkpoint.nbytes([name]) for name in names}
        total, done = sum(sizes.values()), 0

        def count(name: str) -> None:
            nonlocal done
            done += sizes[name]
            if int(10 * done / total) > int(10 * self._loaded):
                log.info("stage %d: loaded %.2f of %.2f GB", self._spec.index, done / 1e9, total / 1e9)
            self._loaded = done / total

        return count

    @staticmethod
    def _gpu_share() -> float:
        """GPUs that Ray has given this process; a part of one if stages share it."""
        return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0))

    def _kv_dtype(self) -> torch.dtype:
        return FLOAT8 if self._spec.config.cache.dtype == "fp8" else self._group.leader.dtype

    def _num_blocks(self) -> int:
        """KV blocks that fit into the memory set aside for them."""
        cache = self._spec.config.cache
        per_block = self._block_bytes()
        if cache.memory_gb is not None:
            return int(cache.memory_gb * 1e9) // sum(per_block)
        if self._device.type == "cpu":
            raise ValueError("cache.memory_gb must be set on cpu: how much memory each stage may use for its KV cache")
        scheduler = self._spec.config.scheduler
        budgets = kv_budgets(
            self._group, cache.memory_fraction, scheduler.max_num_seqs, scheduler.max_num_batched_tokens,
            cache.block_size, self._kv_dtype(), min(1.0, self._gpu_share() or 1.0),
        )  # fmt: skip
        if cache.host_gb:
            budgets = [budget - COPY_BUFFERS * STAGING_BYTES for budget in budgets]
        return min(budget // size for budget, size in zip(budgets, per_block, strict=True)) - 1  # one is for padding

    def _block_bytes(self) -> list[int]:
        """Of a KV block, on each device."""
        size, kinds = self._spec.config.cache.block_size, self._group.decoders
        return [KVCache.bytes_per_block(d.config, len(d.layers), size, self._kv_dtype()) for d in kinds]

    def _num_places(self) -> int:
        return int(self._spec.config.cache.host_gb * 1e9) // sum(self._block_bytes())

    def allocate(self, num_blocks: int, num_places: int) -> None:
        """The KV cache, so many places for copies of its blocks, and on a GPU the captured steps that work on it.

        The end of the start, once for all epochs.
        """
        cache, scheduler = self._spec.config.cache, self._spec.config.scheduler
        self._stage = Stage(
            self._group, num_blocks, cache.block_size, scheduler.max_num_seqs, self._kv_dtype(), self._adapters
        )
        if self._device.type == "cuda":
            self._stage.capture(
                scheduler.max_num_batched_tokens,
                lambda done, total: log.info("stage %d: graph %d/%d", self._spec.index, done, total),
                self._spec.config.max_decodes,
            )
        if num_places:
            member = f"stage {self._spec.index}, {self._spec.layers}"
            self._stage.keep_copies(copies_family(self._spec.config), member, num_places)
        freeze_heap()

    def drop_copies(self) -> None:
        """The pipeline ends for good: nobody is to find them."""
        if self._stage is not None:
            self._stage.drop_copies()

    def listen(self, timeout_s: float) -> tuple[str, int]:
        """Open the meeting point for the link to the next stage, on the last one for that to the first."""
        self._rendezvous = Rendezvous(self._host, timeout_s)
        return self._rendezvous.address

    def link(self, key: str, before: tuple[str, int], timeout_s: float) -> bool:
        """Connect to the neighbours in the ring; returns when both ends of each link are up. Raises `LinkBroken`.

        `before` is where the stage before listens, for the first one the last. Even stages meet the next one first,
        odd ones the one before: so nobody waits for a chain of others; first and last meet in the end. Says whether
        tokens come to the first stage straight from the last.
        """
        first, last = self._spec.layers.is_first, self._spec.layers.is_last
        if self._spec.index % 2 == 0:
            self._link_downstream(key, timeout_s)
        if not first:
            store = join(before, timeout_s)
            self._upstream = make_link(store, DOWNSTREAM, self._host, key, timeout_s, self._link_device)
        if self._spec.index % 2 == 1:
            self._link_downstream(key, timeout_s)
        if first or last:
            store, rank = (join(before, timeout_s), DOWNSTREAM) if first else (self._store(), UPSTREAM)
            self._tokens = make_token_link(store, rank, self._host, key, timeout_s, self._link_device)
        return self._tokens is not None

    def _link_downstream(self, key: str, timeout_s: float) -> None:
        if not self._spec.layers.is_last:
            self._downstream = make_link(self._store(), UPSTREAM, self._host, key, timeout_s, self._link_device)

    def _store(self) -> TCPStore:
        assert self._rendezvous is not None, "a stage listens before it is linked"
        return self._rendezvous.store

    def run(self, control: ControlAddress, epoch: int) -> None:
        """Execute batches until told to stop. Any exception ends the actor's task: the engine sees it at once."""
        assert self._stage is not None
        client = ControlClient(control, self._spec.index)
        try:
            client.send(Ready(epoch, self._spec.index))
            links = self._upstream, self._downstream, self._tokens
            at_once = max_in_flight(self._spec.config.pipeline.stages)
            self._loop = StageLoop(self._spec.index, self._stage, client, epoch, *links, at_once)
            self._loop.run()
        finally:
            self._loop = None
            client.close()
            self._unlink()

    def let_go(self) -> None:
        """While `run` runs: free its host, which may wait for a device that waits for a neighbour who is gone."""
        links = self._upstream, self._downstream, self._tokens
        close_all(link for link in links if link is not None and link.on_device)

    def _unlink(self) -> None:
        """Close the connections, so that the neighbours do not wait for a stage that has left its loop."""
        close_all((self._upstream, self._downstream, self._tokens))
        self._upstream = self._downstream = self._tokens = self._rendezvous = None


def devices_of(pipeline: PipelineArgs) -> list[torch.device]:
    """Of a stage in its own process: as many GPUs as it is to have, or its CPU several times."""
    if pipeline.device == "cpu":
        return [torch.device("cpu")] * pipeline.tensor_parallel
    return [torch.device("cuda", i) for i in range(pipeline.tensor_parallel)]


def copies_family(config: EngineConfig) -> str:
    """All that copies of KV blocks depend on: those of another one are not looked for. Files go by size and date."""
    path = resolve_path(config.model.path)
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.is_file()) if path.is_dir() else []
    found = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    model = config.model.model_dump(include={"path", "dtype", "quantization", "quantization_ignore", "load_format"})
    cache, pipeline = config.cache, config.pipeline
    return str((found, model, cache.dtype, cache.block_size, pipeline.device, pipeline.tensor_parallel))
