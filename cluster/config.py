"""Configuration of one pipeline: frozen, complete, and strict (an unknown key is an error that names its path)."""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.scheduling.fairness import Policy
from cluster.scheduling.speculation import MOST_DECODES, MOST_DRAFTED
from model.adapters import MAX_RANK, NAME
from model.config import INT4_BLOCK, Int4Layout, ModelConfig, float8_products
from model.text.prompt_formats import PROMPT_FORMATS, PromptFormatName
from model.weights import read_config, resolve_path

FLOAT8_NEEDS_CUDA = "model.quantization: fp8 needs pipeline.device: cuda"
FORMAT_NAMES = ", ".join(("none", *PROMPT_FORMATS))
AdapterName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
DEFAULT_ADAPTERS = 8  # that run at once
PositiveInt = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """Base of all our configuration: no unknown keys, no changes afterwards, no silent conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelArgs(Strict):
    """Which weights to serve, and as what."""

    path: str = Field(
        description="checkpoint file or directory, pkg:module/file inside a Python package, or shape:llama-2-70b"
    )
    name: str = Field(description="the model name that clients use")
    aliases: list[str] = Field(
        default=[], description="further names that clients may use, those of a hosted service for example"
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="bfloat16",
        description="type of the weights; a cpu without it multiplies them in float32",
    )
    quantization: Literal["none", "fp8", "int4"] = Field(
        default="none",
        description="fp8 (cuda only): layers' weights and activations in 8 bits, quantised at load; int4: weights made "
        "up in 4 bits (load_format: dummy; of a checkpoint it is seen)",
    )
    quantization_ignore: list[str] = Field(
        default=[],
        description="products that fp8 leaves in dtype: w2 (that of every layer; also wqkv, wo, w13), layers.29.w2, "
        "layers.0.*",
    )
    load_format: Literal["auto", "dummy"] = Field(
        default="auto",
        description="auto: read the weights at path; dummy: random weights of its shape, for capacity tests",
    )
    max_model_len: PositiveInt | None = Field(
        default=None, description="longest prompt + output, in tokens; default: what the model was trained for"
    )
    adapters: dict[AdapterName, str] = Field(
        default={}, description="LoRA adapters that clients may name as model: name: path (PEFT directory or GGUF)"
    )
    adapter_dir: str | None = Field(
        default=None, description="directory of further adapters, each under its own name, loaded when it is asked for"
    )
    max_loaded_adapters: Annotated[int, Field(ge=0, le=1024)] | None = Field(
        default=None, description="adapters that run at once; default: 8 if adapters or adapter_dir say any, else 0"
    )
    max_adapter_rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = Field(
        default=64, description="the largest rank of an adapter: each of those that run at once takes room for it"
    )
    max_host_adapters: PositiveInt = Field(
        default=64, description="adapters that stages keep in their hosts' memory, from where one is loaded in no time"
    )
    prompt_format: Literal["auto", "none"] | PromptFormatName = Field(
        default="auto", description="of chats: the checkpoint's own template, or one of these: " + FORMAT_NAMES
    )
    sampling_defaults: Literal["none", "checkpoint"] = Field(
        default="none",
        description="what a request in OpenAI's form does not say; none: OpenAI's (temperature 1); checkpoint: "
        "temperature, top_p, top_k, min_p and repetition_penalty of generation_config.json",
    )

    @property
    def num_adapters(self) -> int:
        """Slots for adapters; 0: none are served."""
        if self.max_loaded_adapters is not None:
            return self.max_loaded_adapters
        return DEFAULT_ADAPTERS if self.adapters or self.adapter_dir else 0


class PipelineArgs(Strict):
    """How the model is spread over stages."""

    stages: PositiveInt = Field(default=1, description="number of stage actors")
    split: Literal["auto"] | list[PositiveInt] = Field(
        default="auto",
        description="layers per stage, e.g. [41, 39]; auto balances by weight; `bench offline --steady` proposes one "
        "by measured steps",
    )
    tensor_parallel: PositiveInt = Field(
        default=1,
        description="GPUs of each stage, on one node; each holds a share of every layer",
    )
    device: Literal["cpu", "cuda"] = Field(default="cuda", description="where stages compute")
    threads: PositiveInt = Field(default=1, description="CPU threads per stage")
    step_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=60.0, description="longest time for any step; one that takes longer has failed, and its stage with it"
    )
    hang_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=2.5,
        description="a step that takes longer has its stages asked: one that does not answer hangs; "
        "one that does gets 10 times what a step of its size has taken so far on top",
    )
    recovery_attempts: Annotated[int, Field(ge=0)] = Field(
        default=3, description="rebuilds in a row, without a finished step between, before the whole pipeline gives up"
    )
    spare: bool = Field(
        default=False, description="keep a started process per stage in reserve, so that a lost one is replaced sooner"
    )
    start_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=1800.0, description="longest time for placing, loading and linking all stages"
    )
    link: Literal["auto", "gloo"] = Field(
        default="auto", description="between stages; auto: NCCL from GPU to GPU, else gloo; gloo: through host memory"
    )
    network_interface: str | None = Field(
        default=None, description="interface for stage traffic; default: the one with the node's Ray address"
    )


class CacheArgs(Strict):
    """The paged KV cache of each stage."""

    dtype: Literal["auto", "fp8"] = Field(
        default="auto",
        description="type of keys and values; auto: that of activations; fp8: 8 bits with a scale per token and head",
    )
    block_size: PositiveInt = Field(default=16, description="tokens per KV block")
    memory_gb: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="KV memory per stage in GB; default on cuda: memory_fraction; required on cpu"
    )
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.9, description="share of the GPU's memory to use in all (weights, activations, KV)"
    )
    host_gb: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="shared memory (/dev/shm) of each stage's node for copies of KV blocks: what leaves the device is "
        "found there, also by a stage that takes another one's place; 0: none",
    )
    prefix_caching: bool = Field(default=True, description="reuse KV blocks of equal prompt beginnings")


class SchedulerArgs(Strict):
    """How requests share the pipeline."""

    max_num_seqs: PositiveInt = Field(default=256, description="sequences running at once")
    max_num_batched_tokens: PositiveInt = Field(default=2048, description="tokens in one batch, prompt and decode")
    policy: Policy = Field(
        default="fcfs",
        description="who of a tenant begins first; fcfs: who came first; longest_first: who may get most tokens, for "
        "lists that are sent at once: they end sooner, but under constant load short requests may wait for ever",
    )


class SpeculationArgs(Strict):
    """Tokens that are drafted ahead and drawn together. What is said stays the same."""

    proposer: Literal["none", "ngram"] = Field(
        default="none",
        description="who drafts; ngram: what followed the same few tokens before, for texts that repeat their prompt",
    )
    tokens: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST_DRAFTED)] = Field(
        default="auto",
        description="drafted of each sequence in a step; auto: as many as pay, by what steps take and what was right",
    )


class EngineConfig(Strict):
    """Everything one pipeline needs to know."""

    model: ModelArgs
    pipeline: PipelineArgs = PipelineArgs()
    cache: CacheArgs = CacheArgs()
    scheduler: SchedulerArgs = SchedulerArgs()
    speculation: SpeculationArgs = SpeculationArgs()

    @property
    def max_decodes(self) -> int:
        """Tokens of a step that only decodes, at most."""
        most = self.scheduler.max_num_seqs
        return most if self.speculation.proposer == "none" else max(most, MOST_DECODES)


def read_model(model: ModelArgs) -> ModelConfig:
    """The shape of what is served. Raises `ValueError` for a checkpoint that cannot be used, or not so."""
    config = read_config(resolve_path(model.path))
    if config.int4 is not None and model.quantization == "fp8":
        raise ValueError("model.quantization: fp8: the checkpoint's layers are in 4 bits already: leave it out")
    in_8_bits(model, config)
    if config.int4 is not None or model.quantization != "int4":
        return config
    if model.load_format != "dummy":
        raise ValueError(
            "model.quantization: int4: nothing is quantised to 4 bits at load: give a checkpoint made by GPTQ or AWQ"
        )
    return replace(config, int4=Int4Layout(INT4_BLOCK))


def in_8_bits(model: ModelArgs, config: ModelConfig) -> frozenset[str]:
    """Names of the layers' products that are to be in 8 bits. Raises `ValueError` for exceptions from what is not."""
    if model.quantization == "fp8":
        return float8_products(config, model.quantization_ignore)
    if model.quantization_ignore:
        raise ValueError(
            f"model.quantization_ignore: {', '.join(model.quantization_ignore)}: this is what fp8 leaves out, but "
            f"model.quantization is {model.quantization}: set it to fp8, or remove the list"
        )
    return frozenset()
