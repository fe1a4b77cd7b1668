"""The `args` of the application in ray_config.yaml: the engine's configuration and how it is offered."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from cluster.config import EngineConfig, PositiveInt, Strict

RouteName = Literal["tgi", "watsonx", "bedrock", "sagemaker"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
PositiveFloat = Annotated[float, Field(gt=0)]


class ConfigError(ValueError):
    """A configuration that cannot work; the message lists every key that is wrong, and why."""


class GatewayArgs(Strict):
    """The HTTP side."""

    replicas: PositiveInt = Field(default=1, description="gateway processes")
    routes: list[RouteName] = Field(
        default=[], description="further APIs, for clients of hosted services: tgi, watsonx, bedrock, sagemaker"
    )
    live_page: bool = Field(
        default=False, description="a page at /live: the pipelines as a moving picture, and a chat box"
    )
    max_body_bytes: PositiveInt = Field(default=8_000_000, description="longer request bodies get 413")
    max_header_bytes: PositiveInt = Field(default=65_536, description="longer request headers get 431")
    allowed_origins: list[str] = Field(
        default=[],
        description='web pages that may ask where there are no keys, e.g. https://chat.example.com; "*": all of them',
    )
    max_messages: Annotated[int, Field(ge=1, le=4096)] = Field(default=2048, description="messages of one chat")
    max_buffered_bytes: PositiveInt = Field(
        default=256_000_000, description="bodies of all open requests together; beyond it, 503"
    )
    body_timeout_s: PositiveFloat = Field(default=30.0, description="a body that takes longer to arrive gets 408")
    write_timeout_s: PositiveFloat = Field(
        default=60.0, description="a client that reads nothing for so long loses its request"
    )
    request_timeout_s: PositiveFloat = Field(
        default=3600.0, description="a request that takes longer in all ends with an error, 408"
    )
    keepalive_s: PositiveFloat = Field(
        default=15.0, description="a stream that has nothing to say for so long gets a comment, so that it stays open"
    )
    ready_max_age_s: PositiveFloat = Field(
        default=10.0, description="a replica whose status is older than this counts as gone"
    )
    max_answers: PositiveInt = Field(
        default=128, description="answers that one request may ask for: prompts times n, or best_of"
    )
    max_request_tokens: PositiveInt = Field(
        default=262_144, description="tokens that several answers of one request may need together, prompts included"
    )
    constraint_timeout_s: PositiveFloat = Field(
        default=5.0, description="a JSON schema, regular expression or grammar that takes longer to compile gets 400"
    )
    resume_attempts: Annotated[int, Field(ge=0)] = Field(
        default=5, description="how often a stream whose engine is lost goes on with another one"
    )
    resume_timeout_s: PositiveFloat = Field(
        default=300.0, description="how long such a stream waits for an engine before it ends with an error"
    )


class AuthArgs(Strict):
    """Who may ask. Without keys everybody may."""

    required: bool = Field(default=False, description="start only if there are keys, and ask every request for one")
    keys_file: str | None = Field(
        default=None,
        description="API keys, as `caravan keys add NAME` writes them; changes are noticed within a second",
    )
    keys_env: str | None = Field(
        default=None, description="environment variable of the gateways with the same text, e.g. from a secret"
    )


class AdmissionArgs(Strict):
    """Which requests are taken."""

    target_ttft_s: PositiveFloat = Field(
        default=30.0, description="a request that would wait longer before an engine begins with it gets 429"
    )


class LoggingArgs(Strict):
    """What is logged."""

    level: LogLevel = Field(default="INFO", description="lines below it are not written")
    log_prompts: bool = Field(
        default=False, description="for debugging: log every prompt and answer in full; otherwise neither ever is"
    )


class AutoscalingArgs(Strict):
    """How many pipelines there are."""

    min_replicas: Annotated[int, Field(ge=0)] = Field(
        default=1, description="pipelines that always run; 0: none while nobody asks"
    )
    max_replicas: PositiveInt = Field(default=1, description="pipelines that may run")
    upscale_delay_s: Annotated[float, Field(ge=0)] = Field(default=10.0, description="load must last this long")
    downscale_delay_s: Annotated[float, Field(ge=0)] = Field(default=600.0, description="calm must last this long")
    look_back_period_s: Annotated[float, Field(gt=10)] = Field(
        default=20.0, description="window over which the load is averaged; replicas report every 10 s"
    )


class ResourceArgs(Strict):
    """What Ray reserves for each process."""

    gateway_cpus: PositiveFloat = Field(default=1.0, description="CPUs per gateway replica")
    engine_cpus: PositiveFloat = Field(default=1.0, description="CPUs per engine process")
    stage_cpus: PositiveFloat = Field(default=1.0, description="CPUs per stage")
    stage_gpus: PositiveFloat = Field(default=1.0, description="GPUs per stage, with device cuda")
    accelerator_type: str | None = Field(
        default=None,
        description="GPUs that stages may take, as Ray calls them: H200, H100, A100-80G; default: any",
    )
    node_labels: dict[str, str] = Field(
        default={},
        description='labels of the nodes that stages may run on (`ray start --labels`): {"pool": "chat"}',
    )
    placement: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = Field(
        default="PACK",
        description="of a pipeline's stages: on few nodes, on one, on many, each on a node of its own",
    )
    max_surge_percent: Annotated[int, Field(ge=0, le=100)] = Field(
        default=100,
        description="pipelines that an update starts before it ends old ones, as a share of all; 0 if no GPU is spare",
    )
    drain_timeout_s: PositiveFloat = Field(
        default=600.0, description="how long a replica that goes may finish its requests"
    )


class AppConfig(EngineConfig):
    """Everything under `applications[].args`."""

    gateway: GatewayArgs = GatewayArgs()
    auth: AuthArgs = AuthArgs()
    admission: AdmissionArgs = AdmissionArgs()
    logging: LoggingArgs = LoggingArgs()
    autoscaling: AutoscalingArgs = AutoscalingArgs()
    resources: ResourceArgs = ResourceArgs()


# What each deployment takes in its `user_config`, and takes in again while it runs.
IN_PLACE: dict[str, tuple[str, ...]] = {
    "Gateway": ("gateway", "auth", "admission", "logging"),
    "Engine": ("logging",),
}


def with_user_config(args: dict[str, Any], user_config: Any, deployment: str) -> dict[str, Any]:
    """`args` with the sections that the deployment is given apart from them. Raises `ConfigError`.

    Serve replaces everything when `args` change, and nothing when a `user_config` does.
    """
    if not isinstance(user_config, dict | None):
        raise ConfigError(f"user_config: must be a mapping with the keys {', '.join(IN_PLACE[deployment])}")
    sections = user_config or {}
    for name in sections:
        if name not in IN_PLACE[deployment]:
            here = f"user_config.{name}: {deployment} takes {', '.join(IN_PLACE[deployment])} there"
            raise ConfigError(f"{here}, all else stands in args" if name in AppConfig.model_fields else here)
        # A log level may be one thing for gateways and another for engines.
        if name in args and len([True for taken in IN_PLACE.values() if name in taken]) == 1:
            raise ConfigError(f"user_config.{name}: stands in args too: leave it out there")
    if "replicas" in (sections.get("gateway") or {}):
        raise ConfigError("user_config.gateway.replicas: Serve counts replicas: set autoscaling_config of Gateway")
    return {**args, **sections}


def parse_app_config(args: dict[str, Any]) -> AppConfig:
    """Raises `ConfigError` with one line per problem."""
    try:
        config = AppConfig.model_validate(args)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(error))) from None
    if config.autoscaling.max_replicas < config.autoscaling.min_replicas:
        raise ConfigError("autoscaling.max_replicas: must not be below autoscaling.min_replicas")
    if config.auth.required and not (config.auth.keys_file or config.auth.keys_env):
        raise ConfigError("auth.required: there are no keys: set auth.keys_file or auth.keys_env")
    if config.auth.keys_file and config.auth.keys_env:
        raise ConfigError("auth.keys_env: set either this or auth.keys_file")
    if config.pipeline.tensor_parallel > 1 and config.resources.stage_gpus != 1 and config.pipeline.device == "cuda":
        raise ConfigError("resources.stage_gpus: must be 1 where pipeline.tensor_parallel says how many a stage has")
    if config.pipeline.device == "cpu" and config.cache.memory_gb is None:
        raise ConfigError("cache.memory_gb: required on cpu: how much memory each stage may use for its KV cache")
    model = config.model
    if twice := sorted({model.name, *model.aliases} & model.adapters.keys()):
        raise ConfigError(f"model.adapters: {twice[0]}: is the model's own name or alias: take another one")
    if model.adapters and not model.num_adapters:
        raise ConfigError("model.max_loaded_adapters: is 0, but model.adapters names some: raise it")
    return config


GONE = dict.fromkeys(
    (f"autoscaling.target_{name}" for name in ("tokens_in_flight", "waiting_tokens", "kv_use")),
    "is no setting any more: leave it out; pipelines are added before requests wait for admission.target_ttft_s",
)


def describe(error: ValidationError) -> list[str]:
    """pydantic's findings in plain words: `path: what is wrong`."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"] if part not in ("list[constrained-int]",))
        if path in GONE:
            lines.append(f"{path}: {GONE[path]}")
        elif item["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown key{suggestion(path)}")
        elif item["type"] == "missing":
            lines.append(f"{path}: missing")
        else:
            lines.append(f"{path}: {item['msg']}, got {item['input']!r}")
    return lines


def suggestion(path: str) -> str:
    """`; did you mean ...?` for a mistyped key of ours, or nothing."""
    import difflib

    model: Any = AppConfig
    *parents, name = path.split(".")
    for parent in parents:
        model = getattr(model.model_fields.get(parent), "annotation", None) if model else None
    near = difflib.get_close_matches(name, list(model.model_fields) if model else [], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def markdown_table() -> str:
    """Every key with its default and meaning, as deployments/README.md shows it: `python -m deployments.config`."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for section, info in AppConfig.model_fields.items():
        model: Any = info.annotation
        for key, field in model.model_fields.items():
            default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
            lines.append(f"| `{section}.{key}` | {default} | {field.description} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
