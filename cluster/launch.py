"""From a configuration to a running engine on a placement group."""

import logging

from ray.util.placement_group import PlacementGroup

from cluster.config import EngineConfig, in_8_bits, read_model
from cluster.engine import Engine, Listener
from cluster.patience import Patience
from cluster.pipeline import Pipeline
from cluster.ray_pipeline import Progress, RayPipeline
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.host_tier import HostTier
from cluster.scheduling.ngram import NgramProposer
from cluster.scheduling.scheduler import Scheduler
from model.config import ModelConfig, StageLayers, split_layers
from model.shards import shards

log = logging.getLogger(__name__)


def launch_engine(
    config: EngineConfig,
    group: PlacementGroup,
    first_bundle: int,
    listener: Listener,
    on_progress: Progress = lambda share: None,
) -> Engine:
    """Start the stages in `group` from bundle `first_bundle` on, and the engine that drives them.

    Raises `ValueError` for a configuration or checkpoint that cannot work, `StageDied` if a stage does not come up.
    """
    model = read_model(config.model)
    max_model_len = model_len(config, model)
    pipeline = RayPipeline(config, stage_layers(config, model), max_model_len, group, first_bundle, on_progress)
    try:
        host = HostTier(pipeline.num_places, pipeline.copy_window, pipeline.depth) if pipeline.num_places else None
        return make_engine(config, pipeline, pipeline.num_blocks or 0, max_model_len, listener, model.vocab_size, host)
    except BaseException:
        pipeline.close()
        raise


def make_engine(
    config: EngineConfig,
    pipeline: Pipeline,
    num_blocks: int,
    max_model_len: int,
    listener: Listener,
    vocab_size: int,
    host: HostTier | None = None,
) -> Engine:
    """A started engine on a ready pipeline. Raises `ValueError` if the cache cannot hold one whole sequence."""
    room = num_blocks * config.cache.block_size
    if room < max_model_len:
        raise ValueError(
            f"the KV cache holds {room} tokens, fewer than one sequence of model.max_model_len = {max_model_len}: "
            "raise cache.memory_gb (or cache.memory_fraction), use more stages, or lower model.max_model_len"
        )
    log.info("KV cache: %d blocks of %d tokens", num_blocks, config.cache.block_size)
    scheduler = Scheduler(
        BlockManager(num_blocks, config.cache.block_size, config.cache.prefix_caching, host),
        depth=pipeline.depth,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_model_len=max_model_len,
        policy=config.scheduler.policy,
        max_adapters=config.model.num_adapters,
    )
    if config.speculation.proposer == "ngram":
        tokens = config.speculation.tokens
        scheduler.speculate(NgramProposer(), None if tokens == "auto" else tokens)
    patience = Patience(config.pipeline.hang_timeout_s, config.pipeline.step_timeout_s)
    engine = Engine(
        scheduler,
        pipeline,
        listener,
        patience,
        config.pipeline.recovery_attempts,
        vocab_size,
        config.model.max_host_adapters,
    )
    engine.start()
    return engine


def model_len(config: EngineConfig, model: ModelConfig) -> int:
    """Longest sequence to serve. Raises `ValueError` if the model cannot go that far."""
    wanted = config.model.max_model_len or model.context_length
    if wanted > model.longest_context:
        raise ValueError(
            f"model.max_model_len is {wanted}, but the model was made for {model.longest_context} tokens at most"
        )
    if wanted > model.context_length:
        log.warning("model.max_model_len = %d goes beyond the %d tokens of training", wanted, model.context_length)
    return wanted


def stage_layers(config: EngineConfig, model: ModelConfig) -> list[StageLayers]:
    """Which layers each stage gets."""
    split = config.pipeline.split
    shards(model, config.pipeline.tensor_parallel)  # or say why not
    fp8 = in_8_bits(config.model, model)
    return split_layers(model, config.pipeline.stages, None if split == "auto" else split, fp8)
